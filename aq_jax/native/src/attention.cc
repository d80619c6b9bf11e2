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

// Rows [count][size] of keys or values, `width` numbers apart, and the scales of codes.
template <class T>
struct Lines {
  const T* at;
  int64_t count, size, width;
  const float* scale;  // or null
  int64_t scale_width;

  // Numbers [d, d + LANES) of row j; zeros after the last, and of rows that are not there.
  F part(int64_t j, int64_t d) const {
    if (j >= count || d >= size) return F{};
    const F found = load_part(at + j * width + d, size - d);
    return scale ? found * splat(scale[j * scale_width]) : found;
  }
};

// Write rows as columns [size][columns]; what is beyond them is zero.
template <class T>
void transpose(const Lines<T>& rows, float* to, int64_t columns) {
  for (int64_t j = 0; j < columns; j += LANES)
    for (int64_t d = 0; d < rows.size; d += LANES) {
      F block[LANES];
      for (int64_t i = 0; i < LANES; ++i) block[i] = rows.part(j + i, d);
      turn(block);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, rows.size - d); ++i) store(to + (d + i) * columns + j, block[i]);
    }
}

// Write rows `wide` numbers apart, with zeros after each.
template <class T>
void copy(const Lines<T>& rows, float* to, int64_t wide) {
  for (int64_t j = 0; j < rows.count; ++j)
    for (int64_t d = 0; d < wide; d += LANES) store(to + j * wide + d, rows.part(j, d));
}

// Write keys [begin, begin + count) as columns, and, if there is room for them, values as rows.
template <class T>
void decode(const Heads& h, int64_t begin, int64_t count, float* columns, int64_t keys, float* values, int64_t wide) {
  const bool coded = h.stored == Stored::int8;
  auto lines = [&](const void* at, const float* scale) {
    return Lines<T>{static_cast<const T*>(at) + begin * h.k_width, count, h.size, h.k_width,
                    coded ? scale + begin * h.scale_width : nullptr, h.scale_width};
  };
  transpose(lines(h.k, h.k_scale), columns, keys);
  if (values) copy(lines(h.v, h.v_scale), values, wide);
}

}  // namespace

// softmax(scale q k) v: for 12 queries at a time the scores of all keys, their weights, and the mixed values.
void attention(const Heads& h) {
  const int64_t size = h.size, rows = h.tokens * h.shared;
  // What precedes the first key that any query sees, and follows the last, has no weight.
  int64_t begin = 0, end = h.keys;
  if (h.positions) {
    const auto [low, high] = std::minmax_element(h.positions, h.positions + h.tokens);
    end = std::clamp<int64_t>(*high - h.first + 1, 0, end);
    // A multiple of what is added up at once: so a token's sums do not depend on where the others begin.
    if (h.reach >= 0) begin = std::clamp<int64_t>(*low - h.first - h.reach, 0, end) / LANES * LANES;
  }
  while (h.mask && end && !h.mask[end - 1]) --end;
  const int64_t seen = end - begin, keys = padded(seen), wide = padded(size);
  const bool floats = h.stored == Stored::float32;
  const float* const v = floats ? static_cast<const float*>(h.v) + begin * h.k_width : nullptr;
  const bool holes = h.mask && std::find(h.mask + begin, h.mask + end, false) != h.mask + end;
  const bool copied = !floats || wide != size || rows > MAX_ROWS || holes;  // several tiles read the values
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
  switch (h.stored) {
    case Stored::float32: decode<float>(h, begin, seen, columns, keys, copied ? values : nullptr, wide); break;
    case Stored::bfloat16: decode<uint16_t>(h, begin, seen, columns, keys, values, wide); break;
    case Stored::int8: decode<int8_t>(h, begin, seen, columns, keys, values, wide); break;
  }
  for (int64_t j = 0; holes && j < seen; ++j)  // no weight hides NaN
    if (!h.mask[begin + j]) std::fill_n(values + j * wide, wide, 0.0f);
  for (int64_t j = 0; j < keys; ++j) hidden[j] = j < seen && (!h.mask || h.mask[j]) ? 0 : -inf;
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
      const int64_t token = (first + r) / h.shared, own = h.positions ? h.positions[token] - h.first - begin : token;
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
