// Rows of inputs are rotated, and become 8-bit codes.
#include "set.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "scratch.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {
namespace {

// One pass of a Hadamard transform: to[2 i] = from[i] + from[n / 2 + i], to[2 i + 1] = from[i] - from[n / 2 + i]. Each
// turns one bit of the index and moves it: after log2 n passes all bits are turned, and where they were.
void hadamard_pass(const float* from, int64_t n, float* to) {
  const float* upper = from + n / 2;
  if (n / 2 < LANES) {
    for (int64_t i = 0; i < n / 2; ++i) to[2 * i] = from[i] + upper[i], to[2 * i + 1] = from[i] - upper[i];
    return;
  }
  for (int64_t i = 0; i < n / 2; i += LANES) {
    const F a = load<F>(from + i), b = load<F>(upper + i);
    store(to + 2 * i, low_halves(a + b, a - b));
    store(to + 2 * i + LANES, high_halves(a + b, a - b));
  }
}

// x R, R being the rotation of codes/rotation.py: the signs of Rudin and Shapiro, and a Hadamard matrix.
struct Rotation {
  const int64_t block;
  float *signs, *spare;
  float length;  // the factor that is left out of x R: up to sqrt(2)

  static size_t bytes(int64_t block) { return Scratch::bytes<float>(2 * block) + Scratch::bytes<float>(block); }

  Rotation(Scratch& scratch, int64_t block) : block(block) {
    spare = scratch.take<float>(2 * block);
    signs = scratch.take<float>(block);
    float shrink = 1;  // a power of two, which rounds nothing: sums must not overflow where the rotated row does not
    while (block >= 4 / shrink / shrink) shrink /= 2;
    for (int64_t i = 0; i < block; ++i) signs[i] = __builtin_parityll(i & (i >> 1)) ? -shrink : shrink;
    length = block ? float(1 / shrink / std::sqrt(double(block))) : 1;
  }

  void operator()(const float* x, int64_t inputs, float* to) const {
    for (int64_t start = 0; start < inputs; start += block) {
      const float* from = spare;
      for (int64_t i = 0; i < block; ++i) spare[i] = x[start + i] * signs[i];
      // From one half of the spare memory to the other, and at last to where it belongs.
      for (int64_t n = 1; n < block; n *= 2) {
        float* next = 2 * n == block ? to + start : from == spare ? spare + block : spare;
        hadamard_pass(from, block, next);
        from = next;
      }
    }
  }
};

}  // namespace

// lo = min x, hi = max x (NaN if any x is not finite), scale = max((hi - lo) / 255, 2^-100),
// code = round((x - lo) / scale - 128). Rotated rows are up to sqrt(2) times too long until they have codes.
void quantize_rows(const float* x, int64_t rows, int64_t inputs, int64_t block, int8_t* codes, float* scale,
                   float* offset) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  Scratch scratch(Scratch::bytes<float>(inputs) + Rotation::bytes(block));
  float* rotated = scratch.take<float>(inputs);
  const Rotation rotate(scratch, block);
  for (int64_t r = 0; r < rows; ++r, x += inputs, codes += inputs) {
    if (block) rotate(x, inputs, rotated);
    const float* line = block ? rotated : x;
    F low[2] = {splat(inf), splat(inf)}, high[2] = {splat(-inf), splat(-inf)}, poison[2] = {};
    for (int64_t i = 0; i < inputs; i += LANES) {
      const int odd = i / LANES % 2;
      // The last vector ends where the row does: it may read some numbers twice.
      const F v = inputs < LANES ? first_repeated(line, inputs) : load<F>(line + std::min(i, inputs - LANES));
      low[odd] = min(v, low[odd]), high[odd] = max(v, high[odd]);
      poison[odd] += v * splat(0);  // NaN where v is NaN or infinite
    }
    const float bad = sum(poison[0] + poison[1]);
    const float lo = bad == 0 ? least(min(low[0], low[1])) : nan, hi = -least(-max(high[0], high[1]));
    const float step = bad == 0 ? std::max((hi - lo) * (1.0f / 255), 0x1p-100f) : nan;
    scale[r] = step * rotate.length;
    offset[r] = (lo + 128 * step) * rotate.length;
    // Adding 1.5 * 2^23 rounds to an integer, in the low bits of the sum; as one number, as XLA adds it.
    const F first = splat(lo), inverse = splat(1 / step), round = splat(0x1.8p23f - 128);
    for (int64_t i = 0; i < inputs; i += LANES) {
      const F rounded = fma(load_part(line + i, inputs - i) - first, inverse, round);
      if (inputs - i >= LANES) {
        store_bytes(codes + i, as_int(rounded));
      } else {
        int8_t last[LANES];
        store_bytes(last, as_int(rounded));
        std::memcpy(codes + i, last, inputs - i);
      }
    }
  }
}

void rotate_rows(const float* x, int64_t rows, int64_t inputs, int64_t block, float* y) {
  Scratch scratch(Rotation::bytes(block));
  const Rotation rotate(scratch, block);
  for (int64_t r = 0; r < rows; ++r, x += inputs, y += inputs) {
    rotate(x, inputs, y);
    for (int64_t i = 0; i < inputs; ++i) y[i] *= rotate.length;
  }
}

}  // namespace AQ_ISA
}  // namespace aq
