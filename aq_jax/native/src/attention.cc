// Attention, over whole texts and over a cache.
#include "set.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "math.h"
#include "scratch.h"
#include "simd.h"
#include "tiles.h"

namespace aq {
namespace AQ_ISA {
namespace {

int64_t padded(int64_t count) { return (count + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// Write rows [count][size], `width` floats apart, as columns [size][columns]; what is beyond them is zero.
void transpose(const float* rows, int64_t count, int64_t size, int64_t width, float* to, int64_t columns) {
  for (int64_t j = 0; j < columns; j += LANES)
    for (int64_t d = 0; d < size; d += LANES) {
      F block[LANES];
      for (int64_t i = 0; i < LANES; ++i)
        block[i] = j + i < count ? load_part(rows + (j + i) * width + d, size - d) : F{};
      turn(block);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, size - d); ++i) store(to + (d + i) * columns + j, block[i]);
    }
}

}  // namespace

// softmax(scale q k) v: for 12 queries at a time the scores of all keys, their weights, and the mixed values.
void attention(const Heads& h) {
  const int64_t size = h.size, rows = h.tokens * h.shared;
  // What precedes the first key that any query sees, and follows the last, has no weight.
  int64_t begin = 0, end = h.keys;
  if (h.positions) {
    const auto [low, high] = std::minmax_element(h.positions, h.positions + h.tokens);
    end = std::clamp<int64_t>(*high + 1, 0, end);
    // A multiple of what is added up at once: so a token's sums do not depend on where the others begin.
    if (h.reach >= 0) begin = std::clamp<int64_t>(*low - h.reach, 0, end) / LANES * LANES;
  }
  while (h.mask && end && !h.mask[end - 1]) --end;
  const int64_t seen = end - begin, keys = padded(seen), wide = padded(size);
  const float *const k = h.k + begin * h.k_width, *const v = h.v + begin * h.k_width;
  const bool copied = wide != size || rows > MAX_ROWS;  // several tiles read the values
  Scratch scratch(Scratch::bytes<float>(size * keys) + Scratch::bytes<float>(copied * seen * wide) +
                  Scratch::bytes<float>(keys) + Scratch::bytes<float>(MAX_ROWS * keys) +
                  2 * Scratch::bytes<float>(MAX_ROWS * wide));
  float* columns = scratch.take<float>(size * keys);
  float* values = scratch.take<float>(copied * seen * wide);
  float* hidden = scratch.take<float>(keys);  // minus infinity for keys without weight
  float* queries = scratch.take<float>(MAX_ROWS * wide);
  float* weights = scratch.take<float>(MAX_ROWS * keys);
  float* mixed = scratch.take<float>(MAX_ROWS * wide);
  const float inf = std::numeric_limits<float>::infinity();
  const F scale = splat(h.scale);
  transpose(k, seen, size, h.k_width, columns, keys);
  for (int64_t j = 0; j < keys; ++j) hidden[j] = j < seen && (!h.mask || h.mask[j]) ? 0 : -inf;
  for (int64_t j = 0; copied && j < seen; ++j)
    for (int64_t d = 0; d < wide; d += LANES)
      store(values + j * wide + d, d < size ? load_part(v + j * h.k_width + d, size - d) : F{});
  auto at = [&](int64_t r) { return r / h.shared * h.q_width + r % h.shared * size; };
  const int64_t high = tile_height(rows);
  for (int64_t first = 0; first < rows; first += high) {
    const int64_t count = std::min(high, rows - first);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < size; d += LANES)
        store(queries + r * wide + d, load_part(h.q + at(first + r) + d, size - d) * scale);
    for (int64_t j = 0; j < keys; j += 2 * LANES)
      float_rows(count, queries, wide, columns + j, keys, size, weights + j, keys, Rows{});
    float inverse[MAX_ROWS];
    for (int64_t r = 0; r < count; ++r) {
      float* line = weights + r * keys;
      for (int64_t j = 0; h.cap && j < keys; j += LANES)
        store(line + j, splat(h.cap) * tanh(load<F>(line + j) / splat(h.cap)));
      const int64_t token = (first + r) / h.shared, own = h.positions ? h.positions[token] - begin : token;
      const int64_t last = h.positions ? own : h.reach < 0 ? keys : own + h.reach;
      for (int64_t j = std::max<int64_t>(0, last + 1); j < keys; ++j) line[j] = -inf;
      for (int64_t j = 0; h.reach >= 0 && j < std::min(own - h.reach, keys); ++j) line[j] = -inf;
      F high = splat(std::numeric_limits<float>::lowest()), total = F{};
      for (int64_t j = 0; j < keys; j += LANES) {
        const F hide = load<F>(hidden + j), score = hide < 0 ? hide : load<F>(line + j);
        store(line + j, score);
        high = max(high, score);
      }
      const F top = splat(-least(-high));
      for (int64_t j = 0; j < keys; j += LANES) {
        const F weight = exp(load<F>(line + j) - top);
        store(line + j, weight);
        total += weight;
      }
      inverse[r] = 1 / std::max(sum(total), std::numeric_limits<float>::min());
    }
    for (int64_t d = 0; d < size; d += 2 * LANES)
      float_rows(count, weights, keys, copied ? values + d : v + d, copied ? wide : h.k_width, seen, mixed + d, wide,
                 Rows{});
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < size; d += LANES)
        store_part(h.out + at(first + r) + d, load<F>(mixed + r * wide + d) * splat(inverse[r]), size - d);
  }
}

}  // namespace AQ_ISA
}  // namespace aq
