// Products of a few rows of floats with two vectors' columns, all sums in registers.
#pragma once

#include <utility>

#include "codes.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {

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
  unroll<ROWS * 2>([&](auto i) { store(c + i / 2 * ldc + i % 2 * LANES, acc[i / 2][i % 2]); });
}

template <int... R>
void float_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t count, float* c,
                int64_t ldc, std::integer_sequence<int, R...>) {
  constexpr decltype(&float_tile<1>) tiles[] = {float_tile<R + 1>...};
  tiles[rows - 1](a, lda, b, ldb, count, c, ldc);
}

typedef std::make_integer_sequence<int, MAX_ROWS> Rows;

// Tiles as equal as can be: of 16 rows, two of 8 and not one of 12 and one of 4.
inline int64_t tile_height(int64_t rows, int64_t most = MAX_ROWS) {
  const int64_t tiles = (rows + most - 1) / most;
  return tiles ? (rows + tiles - 1) / tiles : 0;
}

}  // namespace AQ_ISA
}  // namespace aq
