// The kernels, once an instruction set. A row's result depends on no other row, and not on how rows are shared out.
#include "kernels.h"

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

constexpr int64_t VECTORS = PANEL / LANES;  // in a panel

// ---- inputs ---------------------------------------------------------------------------------------------------------

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

// x R, up to a factor in the signs; R is the rotation of codes/rotation.py: the signs of Rudin and Shapiro, and a
// Hadamard matrix.
void rotate(const float* x, int64_t inputs, int64_t block, const float* signs, float* spare, float* to) {
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

// lo = min x, hi = max x (NaN if any x is not finite), scale = max((hi - lo) / 255, 2^-100),
// code = round((x - lo) / scale - 128). Rotated rows are up to sqrt(2) times too long until they have codes.
void quantize_rows(const float* x, int64_t rows, int64_t inputs, int64_t block, int8_t* codes, float* scale,
                   float* offset) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  Scratch scratch(Scratch::bytes<float>(inputs) + Scratch::bytes<float>(2 * block) + Scratch::bytes<float>(block));
  float* rotated = scratch.take<float>(inputs);
  float* spare = scratch.take<float>(2 * block);
  float* signs = scratch.take<float>(block);
  float shrink = 1;  // a power of two, which rounds nothing: sums must not overflow where the rotated row does not
  while (block >= 4 / shrink / shrink) shrink /= 2;
  for (int64_t i = 0; i < block; ++i) signs[i] = __builtin_parityll(i & (i >> 1)) ? -shrink : shrink;
  const float length = block ? float(1 / shrink / std::sqrt(double(block))) : 1;
  for (int64_t r = 0; r < rows; ++r, x += inputs, codes += inputs) {
    if (block) rotate(x, inputs, block, signs, spare, rotated);
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
    scale[r] = step * length;
    offset[r] = (lo + 128 * step) * length;
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

// ---- product --------------------------------------------------------------------------------------------------------

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

// ---- attention ------------------------------------------------------------------------------------------------------

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

}  // namespace

#define AQ_TEXT_(x) #x
#define AQ_TEXT(x) AQ_TEXT_(x)

extern const Kernels kernels;
const Kernels kernels = {AQ_TEXT(AQ_ISA), quantize_rows, product, normalize, attention};

}  // namespace AQ_ISA
}  // namespace aq
