// LayerNorm.
#include "set.h"

#include <cmath>

#include "simd.h"

namespace aq {
namespace AQ_ISA {

// y = (y - mean) / sqrt(mean((y - mean)^2) + eps) * gain + shift
void normalize(const After& after, int64_t row, int64_t row_end, int64_t outputs, float* y) {
  for (int64_t r = row; r < row_end; ++r) {
    float* line = y + r * outputs;
    F total = F{};
    for (int64_t i = 0; i < outputs; i += LANES) total += load_part(line + i, outputs - i);
    const F mean = splat(sum(total) / float(outputs));
    F squares = F{};
    int64_t i = 0;
    for (; i + LANES <= outputs; i += LANES) {
      const F centred = load<F>(line + i) - mean;
      squares = fma(centred, centred, squares);
    }
    float square = sum(squares);
    for (; i < outputs; ++i) square += (line[i] - mean[0]) * (line[i] - mean[0]);
    const F factor = splat(1 / std::sqrt(square / float(outputs) + after.eps));
    for (i = 0; i < outputs; i += LANES) {
      const int64_t left = outputs - i;
      const F gain = load_part(after.gain + i, left), shift = load_part(after.shift + i, left);
      store_part(line + i, fma(load_part(line + i, left) - mean, factor * gain, shift), left);
    }
  }
}

}  // namespace AQ_ISA
}  // namespace aq
