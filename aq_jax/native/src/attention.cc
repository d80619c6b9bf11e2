// Attention over whole texts.
#include "set.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "math.h"
#include "scratch.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {
namespace {

// c[ROWS][2 vectors] = a[ROWS][count] b[count][2 vectors], in the order of b's rows.
template <int ROWS>
void float_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t count, float* c, int64_t ldc) {
  F acc[ROWS][2] = {};
  for (int64_t k = 0; k < count; ++k) {
    const F b0 = load<F>(b + k * ldb), b1 = load<F>(b + k * ldb + LANES);
    for (int r = 0; r < ROWS; ++r) {
      const F one = splat(a[r * lda + k]);
      acc[r][0] = fma(one, b0, acc[r][0]);
      acc[r][1] = fma(one, b1, acc[r][1]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    store(c + r * ldc, acc[r][0]);
    store(c + r * ldc + LANES, acc[r][1]);
  }
}

template <int... R>
void float_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t count, float* c,
                int64_t ldc, std::integer_sequence<int, R...>) {
  constexpr decltype(&float_tile<1>) tiles[] = {float_tile<R + 1>...};
  tiles[rows - 1](a, lda, b, ldb, count, c, ldc);
}

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

// softmax(q k / sqrt(size)) v: for 12 queries at a time the scores of all keys, their weights, and the mixed values.
void attention(const float* q, const float* k, const float* v, const bool* mask, int64_t tokens, int64_t size,
               int64_t width, float* out) {
  int64_t seen = tokens;  // what follows the last key that is not masked has no weight
  while (seen && !mask[seen - 1]) --seen;
  const int64_t keys = padded(seen), wide = padded(size);
  Scratch scratch(Scratch::bytes<float>(size * keys) + Scratch::bytes<float>(seen * wide) +
                  Scratch::bytes<float>(keys) + Scratch::bytes<float>(MAX_ROWS * keys) +
                  2 * Scratch::bytes<float>(MAX_ROWS * wide));
  float* columns = scratch.take<float>(size * keys);
  float* values = scratch.take<float>(seen * wide);
  float* hidden = scratch.take<float>(keys);  // minus infinity for keys without weight
  float* queries = scratch.take<float>(MAX_ROWS * wide);
  float* weights = scratch.take<float>(MAX_ROWS * keys);
  float* mixed = scratch.take<float>(MAX_ROWS * wide);
  const float inf = std::numeric_limits<float>::infinity();
  const F root = splat(float(1 / std::sqrt(double(size))));
  transpose(k, seen, size, width, columns, keys);
  for (int64_t j = 0; j < keys; ++j) hidden[j] = j < seen && mask[j] ? 0 : -inf;
  for (int64_t j = 0; j < seen; ++j)
    for (int64_t d = 0; d < wide; d += LANES)
      store(values + j * wide + d, d < size ? load_part(v + j * width + d, size - d) : F{});
  using Rows = std::make_integer_sequence<int, MAX_ROWS>;
  const int64_t tiles = (tokens + MAX_ROWS - 1) / MAX_ROWS, high = tiles ? (tokens + tiles - 1) / tiles : 0;
  for (int64_t first = 0; first < tokens; first += high) {
    const int64_t rows = std::min(high, tokens - first);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < size; d += LANES)
        store(queries + r * wide + d, load_part(q + (first + r) * width + d, size - d) * root);
    for (int64_t j = 0; j < keys; j += 2 * LANES)
      float_rows(rows, queries, wide, columns + j, keys, size, weights + j, keys, Rows{});
    float inverse[MAX_ROWS];
    for (int64_t r = 0; r < rows; ++r) {
      float* line = weights + r * keys;
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
      float_rows(rows, weights, keys, values + d, wide, seen, mixed + d, wide, Rows{});
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < size; d += LANES)
        store_part(out + (first + r) * width + d, load<F>(mixed + r * wide + d) * splat(inverse[r]), size - d);
  }
}

}  // namespace AQ_ISA
}  // namespace aq
