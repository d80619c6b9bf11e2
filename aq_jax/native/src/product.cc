// Products of 8-bit codes.
#include "set.h"

#include <algorithm>
#include <utility>

#include "math.h"
#include "scratch.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {
namespace {

constexpr int64_t VECTORS = PANEL / LANES;  // in a panel

// Integer sums of ROWS rows and PANELS panels over some steps of four inputs: sums[ROWS][PANELS * 16].
template <int ROWS, int PANELS>
void tile(const int8_t* x, int64_t stride, const uint8_t* w, int64_t panel, int64_t steps, int32_t* sums) {
  constexpr int N = PANELS * VECTORS;
  I acc[ROWS][N] = {};
  for (int64_t s = 0; s < steps; ++s, x += 4, w += 4 * PANEL) {
    U codes[N];
    for (int n = 0; n < N; ++n) codes[n] = load<U>(w + n / VECTORS * panel + n % VECTORS * (4 * LANES));
    for (int r = 0; r < ROWS; ++r) {
      I four = splat4(x + r * stride);
      for (int n = 0; n < N; ++n) acc[r][n] = dot4(acc[r][n], codes[n], four);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < N; ++n) store(sums + (r * N + n) * LANES, acc[r][n]);
}

typedef void (*Tile)(const int8_t*, int64_t, const uint8_t*, int64_t, int64_t, int32_t*);

template <int PANELS, int... R>
constexpr Tile choose(int64_t rows, std::integer_sequence<int, R...>) {
  constexpr Tile tiles[] = {tile<R + 1, PANELS>...};
  return tiles[rows - 1];
}

// Rows of inputs in steps of four, each group filled up with zeros.
const int8_t* in_steps(const Inputs& in, const Weight& w, int64_t row, int64_t rows, int8_t* copy) {
  if (w.size() % 4 == 0) return in.codes + row * w.inputs;
  const int64_t padded = 4 * w.steps();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < w.groups; ++g, copy += padded) {
      std::memcpy(copy, in.codes + (row + r) * w.inputs + g * w.size(), w.size());
      std::memset(copy + w.size(), 0, padded - w.size());
    }
  return copy - rows * w.groups * padded;
}

// act(product + bias) + residual, of outputs from `at`.
inline F follow(const After& after, F product, const float* residual, int64_t at, int64_t count) {
  F y = after.bias ? product + load_part(after.bias + at, count) : product;
  switch (after.act) {
    case Act::none: break;
    case Act::gelu: y = gelu(y); break;
    case Act::gelu_tanh: y = gelu_tanh(y); break;
    case Act::relu: y = max(F{}, y); break;  // NaN stays
  }
  return residual ? load_part(residual + at, count) + y : y;
}

}  // namespace

// With x = sx * qx + ox for a row, and W = sw * (qw - zw) for a group, y is the sum over groups of
// sx * (sw * (qx . qw - zw * sum(qx))) + ox * (sw * (sum(qw) - size * zw)).
void product(const Inputs& in, const Weight& w, const After& after, int64_t row, int64_t row_end, int64_t panel,
             int64_t panel_end, float* y) {
  constexpr int64_t WIDE = 2;  // panels of a tile
  const int64_t rows = row_end - row, groups = w.groups, steps = w.steps(), stride = 4 * steps * groups;
  const int64_t bytes = stride * PANEL;  // of a panel
  Scratch scratch(Scratch::bytes<int8_t>(rows * stride) + Scratch::bytes<int32_t>(rows * groups) +
                  Scratch::bytes<int32_t>(MAX_ROWS * WIDE * PANEL) + Scratch::bytes<float>(MAX_ROWS * WIDE * PANEL));
  const int8_t* x = in_steps(in, w, row, rows, scratch.take<int8_t>(rows * stride));
  int32_t* row_sums = scratch.take<int32_t>(rows * groups);
  int32_t* dots = scratch.take<int32_t>(MAX_ROWS * WIDE * PANEL);
  float* totals = scratch.take<float>(MAX_ROWS * WIDE * PANEL);
  for (int64_t i = 0; i < rows * groups; ++i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < 4 * steps; ++k) sum += x[4 * steps * i + k];
    row_sums[i] = sum;
  }
  // Tiles as equal as can be: of 16 rows, two of 8 and not one of 12 and one of 4.
  const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, high = tiles ? (rows + tiles - 1) / tiles : 0;
  for (int64_t p = panel; p < panel_end; p += WIDE) {
    const int64_t wide = std::min(WIDE, panel_end - p), vectors = wide * VECTORS;
    for (int64_t first = 0; first < rows; first += high) {
      const int64_t count = std::min(high, rows - first);
      using Rows = std::make_integer_sequence<int, MAX_ROWS>;
      const Tile run = wide == 2 ? choose<2>(count, Rows{}) : choose<1>(count, Rows{});
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* codes = w.codes + p * bytes + g * steps * 4 * PANEL;
        run(x + first * stride + g * 4 * steps, stride, codes, bytes, steps, dots);
        for (int64_t n = 0; n < vectors; ++n) {
          const int64_t at = p * PANEL + n * LANES, left = w.outputs - at;
          if (left <= 0) break;
          const float* grid = w.grid(p + n / VECTORS, g) + n % VECTORS * LANES;
          const F sw = load<F>(grid), zw = load<F>(grid + PANEL), sum_w = load<F>(grid + 2 * PANEL);
          const F constant = sw * fma(splat(-float(w.size())), zw, sum_w);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t i = row + first + r, tile_at = (r * vectors + n) * LANES;
            const int32_t sum = row_sums[(first + r) * groups + g];
            const F dot = to_float(load<I>(dots + tile_at) - OFFSET * sum);
            const F part = sw * fma(zw, splat(-float(sum)), dot);
            F value = fma(splat(in.scale[i]), part, splat(in.offset[i]) * constant);
            if (g) value += load<F>(totals + tile_at);
            if (g + 1 < groups) {
              store(totals + tile_at, value);
            } else {
              const float* residual = after.residual ? after.residual + i * w.outputs : nullptr;
              store_part(y + i * w.outputs + at, follow(after, value, residual, at, left), left);
            }
          }
        }
      }
    }
  }
}

}  // namespace AQ_ISA
}  // namespace aq
