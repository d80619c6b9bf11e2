// Products of rows with a packed weight.
#include "product.h"

#include <optional>

#include "math.h"
#include "scratch.h"
#include "tiles.h"
#include "trellis.h"

namespace aq {
namespace AQ_ISA {
namespace {

constexpr int64_t WIDE = 2 * PANEL;  // outputs that are computed together

template <int DIGITS>
using Unpacked = std::conditional_t<DIGITS == 0, float, uint8_t>;

template <Act ACT>
inline F activate(F x) {
  if constexpr (ACT == Act::gelu) return gelu(x);
  if constexpr (ACT == Act::gelu_tanh) return gelu_tanh(x);
  if constexpr (ACT == Act::relu) return max(F{}, x);  // NaN stays
  if constexpr (ACT == Act::silu) return silu(x);
  return x;
}

// act(product + bias) * factor + residual, of `left` outputs from `at` that fill a vector or not, for every row.
template <Act ACT, bool WHOLE>
void follow(const Inputs& in, const Weight& w, const After& after, int64_t row, int64_t rows, int64_t at, int64_t left,
            const float* totals, int64_t between, float* y) {
  auto read = [&](const float* p) { return WHOLE ? load<F>(p) : load_part(p, left); };
  const F bias = after.bias ? read(after.bias + at) : F{}, constant = in.floats ? F{} : load<F>(w.sums(at));
  int64_t to = row * w.outputs + at;
  for (int64_t r = row; r < row + rows; ++r, totals += between, to += w.outputs) {
    F value = load<F>(totals);
    if (!in.floats) value = fma(splat(in.scale[r]), value, splat(in.offset[r]) * constant);
    value = activate<ACT>(after.bias ? value + bias : value);
    if (after.factor) value *= read(after.factor + to);
    if (after.residual) value = read(after.residual + to) + value;
    if (WHOLE) store(y + to, value);
    else store_part(y + to, value, left);
  }
}

// Codes as bytes, [steps][16][4].
template <int BITS>
void unpack(const uint8_t* chunk, int64_t chunks, uint8_t* __restrict to) {
  using P = Planes<BITS>;
  for (int64_t c = 0; c < chunks; ++c, chunk += P::LINES * LINE, to += P::STEPS * LINE)
    for (int at = 0; at < LINE; at += 4 * LANES)
      unroll<P::STEPS>([&](auto s) { store(to + s * LINE + at, step_of<BITS, s>(chunk + at)); });
}

// Signed codes times 2^(32 - bits) as floats, [inputs][WIDE], of which a panel has 16.
template <int BITS>
void unpack(const uint8_t* chunk, int64_t chunks, float* __restrict to) {
  using P = Planes<BITS>;
  for (int64_t c = 0; c < chunks; ++c, chunk += P::LINES * LINE, to += 4 * P::STEPS * WIDE)
    for (int v = 0; v < VECTORS; ++v)
      unroll<P::STEPS>([&](auto s) {
        const W codes = signed_step_of<BITS, s>(chunk + v * (4 * LANES));
        unroll<4>([&](auto j) { store(to + (4 * s + j) * WIDE + v * LANES, float_of<j>(codes)); });
      });
}

// The trellis codes of a weight, of which a panel's rows are unpacked for some columns; behind the last one are zeros.
struct TrellisWeight {
  const Tiles tiles;
  const Levels levels;

  explicit TrellisWeight(const Weight& w) : tiles(w.tiles()), levels(tiles) {}

  // Call f(column, levels of the panel's rows + LEVEL_OFFSET).
  template <class Function>
  void each(int64_t panel, int64_t at, int64_t count, const Function& f) const {
    const Tile tile = tile_of(tiles, tiles.stream, panel * PANEL);
    for (int64_t c = 0; c < std::min(count, tiles.columns - at); ++c) {
      W its[VECTORS];
      levels.of_column(tile, at + c, its);
      f(c, its);
    }
  }

  // As bytes, [steps][16][4].
  void unpack(int64_t panel, int64_t at, int64_t count, uint8_t* to) const {
    W four[VECTORS] = {};
    each(panel, at, count, [&](int64_t c, const W (&its)[VECTORS]) {
      for (int v = 0; v < VECTORS; ++v) {
        four[v] = c % 4 ? four[v] | its[v] << (8 * (c % 4)) : its[v];
        store(to + c / 4 * LINE + v * (4 * LANES), four[v]);
      }
    });
  }

  // Times 2^24 as floats, [inputs][WIDE].
  void unpack(int64_t panel, int64_t at, int64_t count, float* to) const {
    each(panel, at, count, [&](int64_t c, const W (&its)[VECTORS]) {
      for (int v = 0; v < VECTORS; ++v) store(to + c * WIDE + v * LANES, to_float(((I)its[v] - LEVEL_OFFSET) << 24));
    });
    for (int64_t c = std::max<int64_t>(0, tiles.columns - at); c < count; ++c)
      std::fill_n(to + c * WIDE, PANEL, 0.0f);
  }
};

// Where a part of a weight is, of one panel or two, whose codes lie `between` bytes apart.
struct PartOfWeight {
  const uint8_t* codes;
  GridAt grids[2];
  int64_t count, between, pair_sums;
  int added, lift;

  PartOfWeight of_panel(int64_t p) const {
    return {codes + p * between, {grids[p], grids[p]}, count, between, pair_sums, added, lift};
  }
};

// How products are added: in pairs, widened after pair_sums, or by dot4, of codes that are narrow or not.
enum class Add { pairs, narrow, wide };

// sums = add(sums, codes, inputs), for four inputs a step.
template <int ROWS, int N, int DIGITS, class Function>
inline __attribute__((always_inline)) void add_steps(const int8_t* x, int64_t stride, const uint8_t* codes,
                                                     int64_t between, int64_t steps, I (&sums)[ROWS][N][DIGITS],
                                                     const Function& add) {
  do {  // GCC spills sums that may come from before a loop
    U its[N];
    for (int n = 0; n < N; ++n) its[n] = load<U>(codes + n / VECTORS * between + n % VECTORS * (4 * LANES));
    for (int r = 0; r < ROWS; ++r)
      for (int d = 0; d < DIGITS; ++d) {
        const I four = splat4(x + (r * DIGITS + d) * stride);
        for (int n = 0; n < N; ++n) sums[r][n][d] = add(sums[r][n][d], its[n], four);
      }
    x += 4, codes += LINE;
  } while (--steps);
}

// totals[ROWS][WIDE] += products with a part of PANELS panels, whose codes are bytes.
template <int ROWS, int DIGITS, int PANELS, Add ADD>
void byte_tile(const int8_t* x, int64_t stride, const Part<DIGITS>* parts, const PartOfWeight& w, float* totals) {
  constexpr int N = PANELS * VECTORS;
  I acc[ROWS][N][DIGITS] = {};
  const int64_t steps = w.count / 4;
  if constexpr (ADD == Add::pairs) {
    for (int64_t at = 0, some; at < steps; at += some) {
      some = std::min(steps - at, w.pair_sums);
      I pairs[ROWS][N][DIGITS] = {};
      add_steps(x + 4 * at, stride, w.codes + at * LINE, w.between, some, pairs, add_pairs);
      for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n)
          for (int d = 0; d < DIGITS; ++d) acc[r][n][d] = add_widened(acc[r][n][d], pairs[r][n][d]);
    }
  } else {
    add_steps(x, stride, w.codes, w.between, steps, acc, dot4<ADD == Add::narrow>);
  }
  // Copies, which no store to totals may change: they are read once.
  const GridAt grids[] = {w.grids[0], w.grids[1]};
  const int added = w.added, lift = w.lift;
  unroll<ROWS>([&](auto r) {
    const Part<DIGITS> part = parts[r];
    unroll<N>([&](auto n) {
      float* total = totals + r * WIDE + n * LANES;
      store(total, join<DIGITS>(load<F>(total), acc[r][n], part, grids[n / VECTORS], n % VECTORS * LANES, added, lift));
    });
  });
}

template <int DIGITS, int PANELS, Add ADD, int... R>
void byte_rows(int64_t rows, const int8_t* x, int64_t stride, const Part<DIGITS>* parts, const PartOfWeight& w,
               float* totals, std::integer_sequence<int, R...>) {
  constexpr decltype(&byte_tile<1, DIGITS, PANELS, ADD>) tiles[] = {byte_tile<R + 1, DIGITS, PANELS, ADD>...};
  constexpr int64_t most = sizeof...(R);
  const int64_t high = tile_height(rows, most);
  for (int64_t first = 0; first < rows; first += high)
    tiles[std::min(high, rows - first) - 1](x + first * DIGITS * stride, stride, parts + first, w,
                                            totals + first * WIDE);
}

// Call f(how products with codes of so many bits are added, as a constant); one instance for each way that there is.
template <class Function>
void with_add(int64_t bits, const Function& f) {
  if constexpr (PAIR_ROWS > 0)
    if (pair_sums(bits)) return f(std::integral_constant<Add, Add::pairs>{});
  if constexpr (NARROW_DIFFERS)
    if (bits < 8) return f(std::integral_constant<Add, Add::narrow>{});
  f(std::integral_constant<Add, Add::wide>{});
}

// totals[rows][WIDE] += products with a part of some panels of a weight, unpacked first, if need be.
template <int DIGITS>
void multiply(const Operand<DIGITS>& x, int64_t at, int64_t part, int64_t rows, int64_t bits,
              const std::optional<TrellisWeight>& trellis, PartOfWeight w, int64_t panel, int64_t panels,
              uint8_t* unpacked, float* totals) {
  const Part<DIGITS>* parts = x.parts + part * rows;
  const int64_t between = w.count / 4 * LINE;
  if (trellis) {
    for (int64_t p = 0; p < panels; ++p) trellis->unpack(panel + p, at, w.count, unpacked + p * between);
    w.codes = unpacked, w.between = between;
  } else if (bits < 8) {
    with_bits(bits, [&](auto known) {
      if constexpr (known < 8)
        for (int64_t p = 0; p < panels; ++p)
          unpack<known>(w.codes + p * w.between, w.count / (4 * Planes<known>::STEPS), unpacked + p * between);
    });
    w.codes = unpacked, w.between = between;
  }
  with_add(bits, [&](auto add) {
    using Heights = std::make_integer_sequence<int, std::max(1, (add == Add::pairs ? PAIR_ROWS : MAX_ROWS) / DIGITS)>;
    const auto* in = x.x + at;
    if constexpr (add == Add::pairs)
      for (int64_t p = 0; p < panels; ++p)
        byte_rows<DIGITS, 1, add>(rows, in, x.stride, parts, w.of_panel(p), totals + p * PANEL, Heights{});
    else if (panels == 1)
      byte_rows<DIGITS, 1, add>(rows, in, x.stride, parts, w, totals, Heights{});
    else
      byte_rows<DIGITS, 2, add>(rows, in, x.stride, parts, w, totals, Heights{});
  });
}

void multiply(const Operand<0>& x, int64_t at, int64_t part, int64_t rows, int64_t bits,
              const std::optional<TrellisWeight>& trellis, const PartOfWeight& w, int64_t panel, int64_t panels,
              float* unpacked, float* totals) {
  const int64_t high = tile_height(rows);
  for (int64_t p = 0; trellis && p < panels; ++p) trellis->unpack(panel + p, at, w.count, unpacked + p * PANEL);
  if (!trellis)
    with_bits(bits, [&](auto known) {
      for (int64_t p = 0; p < panels; ++p)
        unpack<known>(w.codes + p * w.between, w.count / (4 * Planes<known>::STEPS), unpacked + p * PANEL);
    });
  float dots[MAX_ROWS * WIDE];
  for (int64_t first = 0; first < rows; first += high) {
    const int64_t count = std::min(high, rows - first);
    for (int64_t n = 0; n < panels * PANEL; n += 2 * LANES)
      float_rows(count, x.x + first * x.stride + at, x.stride, unpacked + n, WIDE, w.count, dots + n, WIDE, Rows{});
    for (int64_t r = 0; r < count; ++r)
      for (int64_t n = 0; n < panels * PANEL; n += LANES) {
        float* total = totals + (first + r) * WIDE + n;
        const F its[1] = {load<F>(dots + r * WIDE + n)};
        store(total, join<0>(load<F>(total), its, x.parts[part * rows + first + r],
                             w.grids[n / PANEL], n % PANEL, 0, w.lift));
      }
  }
}

// Products of many rows: two panels of a part at a time, which are unpacked once for all rows.
template <int DIGITS>
void product_rows(const Operand<DIGITS>& x, const Inputs& in, const Weight& w, const After& after, int64_t row,
                  int64_t rows, int64_t panel, int64_t panel_end, Scratch& scratch, float* y) {
  auto* unpacked = scratch.take<Unpacked<DIGITS>>(WIDE * std::min(w.padded(), Kind<DIGITS>::PART));
  float* totals = scratch.take<float>(rows * WIDE);
  const int added = w.bits == 8 ? OFFSET : 1 << (w.bits - 1);
  std::optional<TrellisWeight> trellis;
  if (w.step_bits) trellis.emplace(w);
  for (int64_t p = panel; p < panel_end; p += 2) {
    const int64_t panels = std::min<int64_t>(2, panel_end - p);
    const uint8_t* codes = trellis ? nullptr : w.codes + p * w.bytes();
    std::fill_n(totals, rows * WIDE, 0.0f);
    GridsOf<2> grids(w, p, panels);
    for (int64_t g = 0, at = 0, part = 0; g < w.groups; ++g) {
      grids.next(g);
      const GridAt first = grids.at(0, g), second = panels > 1 ? grids.at(1, g) : first;
      for (int64_t left = w.padded(), count; left > 0; left -= count, at += count, ++part) {
        count = std::min(left, Kind<DIGITS>::PART);
        const PartOfWeight its = {codes, {first, second}, count, w.bytes(), pair_sums(w.bits), added, int(w.lift)};
        multiply(x, at, part, rows, w.bits, trellis, its, p, panels, unpacked, totals);
        if (codes) codes += count * w.bits / 32 * LINE;
      }
    }
    finish(in, w, after, row, rows, p * PANEL, panels * PANEL, totals, WIDE, y);
  }
}

// Parts of inputs, for codes of so many bits, followed by zeros up to `padded`: copied, divided by a scale, or made
// digits, which lie `stride` bytes apart.
void read_part(const int8_t* x, int64_t size, int64_t padded, int64_t, int64_t, int8_t* to, Part<1>& part) {
  int32_t sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += x[i];
  part = {1, float(sum), {sum}};
  std::memcpy(to, x, size);
  std::fill_n(to + size, padded - size, 0);
}

void read_part(const float* x, int64_t size, int64_t padded, int64_t, int64_t bits, float* to, Part<0>& part) {
  F most = F{}, total = F{};
  for (int64_t i = 0; i < size; i += LANES) {
    const F v = load_part(x + i, size - i);
    most = max(v < 0 ? -v : v, most);
  }
  // The power of two below the largest number: divided by it, numbers are far from the ends of floats' range.
  float scale = -least(-most);
  uint32_t power;
  std::memcpy(&power, &scale, 4);
  power = std::clamp(power & 0x7F800000, 1u << 23, 253u << 23);
  std::memcpy(&scale, &power, 4);
  const float inverse = 1 / scale, less = 1 / float(int64_t(1) << (32 - bits));
  for (int64_t i = 0; i < padded; i += LANES) {
    const F v = i < size ? load_part(x + i, size - i) * inverse : F{};
    total += v;
    store_part(to + i, v * less, padded - i);
  }
  part = {scale, sum(total), {0}};
}

void read_part(const float* x, int64_t size, int64_t padded, int64_t stride, int64_t, int8_t* to, Part<3>& part) {
  F most = F{}, poison = F{};
  for (int64_t i = 0; i < size; i += LANES) {
    const F v = load_part(x + i, size - i);
    most = max(v < 0 ? -v : v, most);
    poison += v * splat(0);  // NaN where v is NaN or infinite
  }
  // The largest number is a little less than 127 in the first digit and in all others; scales have inverses.
  const float scale = std::max(-least(-most) * (1 / 8.355e6f), 0x1p-126f) + sum(poison);
  const F inverse = splat(1 / scale);
  I sums[3] = {};
  for (int64_t i = 0; i < padded; i += LANES) {
    I left = to_int(i < size ? load_part(x + i, size - i) * inverse : F{});
    for (int d = 2; d >= 0; --d) {
      const I digit = left << 24 >> 24;
      sums[d] += digit;
      left = (left - digit) >> 8;
      int8_t bytes[LANES];
      store_bytes(bytes, digit);
      std::memcpy(to + d * stride + i, bytes, std::min<int64_t>(LANES, padded - i));
    }
  }
  for (int d = 0; d < 3; ++d) {
    part.digits[d] = 0;
    for (int i = 0; i < LANES; ++i) part.digits[d] += sums[d][i];
  }
  part.scale = scale;
  part.sum = float(int64_t(part.digits[0]) * 65536 + part.digits[1] * 256 + part.digits[2]);
}

// Rows up to which a product is one of few: of about so many both take the same time.
template <int DIGITS>
constexpr int64_t few_rows(int64_t bits) {
  if (DIGITS == 3) return 4;
  if (DIGITS == 1 && PAIR_ROWS > 0) return pair_sums(bits) ? 2 : 1;
  return bits < 8 ? 3 : 1;
}

template <int DIGITS, class T>
void product_of(const T* x, const Inputs& in, const Weight& w, const After& after, int64_t row, int64_t row_end,
                int64_t panel, int64_t panel_end, float* y) {
  using K = Kind<DIGITS>;
  typedef typename K::Input Input;
  const int64_t rows = row_end - row, lines = rows * K::LINES, size = w.size(), padded = w.padded();
  // An odd number of cache lines: rows a power of two apart would evict each other.
  const int64_t stride = (w.groups * padded + 127) / 128 * 128 + 64;
  const int64_t count = w.groups * ((padded + K::PART - 1) / K::PART);
  Scratch scratch(Scratch::bytes<Input>(lines * stride) + Scratch::bytes<Part<DIGITS>>(rows * count) +
                  Scratch::bytes<Input>(WIDE * std::min(padded, K::PART)) + Scratch::bytes<float>(rows * WIDE));
  Input* copy = scratch.take<Input>(lines * stride);
  auto* parts = scratch.take<Part<DIGITS>>(rows * count);
  const Operand<DIGITS> operand = {copy, parts, stride};
  for (int64_t r = row; r < row_end; ++r, copy += K::LINES * stride, ++parts)
    for (int64_t g = 0, part = 0; g < w.groups; ++g)
      for (int64_t at = 0; at < padded; at += K::PART)
        read_part(x + r * w.inputs + g * size + at, std::min(K::PART, size - at), std::min(K::PART, padded - at),
                  stride, w.bits, copy + g * padded + at, parts[part++ * rows]);
  if (!w.step_bits && rows <= few_rows<DIGITS>(w.bits))
    return product_few(operand, in, w, after, row, rows, panel, panel_end, y);
  product_rows(operand, in, w, after, row, rows, panel, panel_end, scratch, y);
}

}  // namespace

void finish(const Inputs& in, const Weight& w, const After& after, int64_t row, int64_t rows, int64_t at, int64_t count,
            const float* totals, int64_t between, float* y) {
  auto run = [&](auto act) {
    for (int64_t n = 0; n < count && at + n < w.outputs; n += LANES) {
      const int64_t left = w.outputs - at - n;
      const auto one = left >= LANES ? follow<act, true> : follow<act, false>;
      one(in, w, after, row, rows, at + n, left, totals + n, between, y);
    }
  };
  switch (after.act) {
    case Act::none: return run(std::integral_constant<Act, Act::none>{});
    case Act::gelu: return run(std::integral_constant<Act, Act::gelu>{});
    case Act::gelu_tanh: return run(std::integral_constant<Act, Act::gelu_tanh>{});
    case Act::relu: return run(std::integral_constant<Act, Act::relu>{});
    case Act::silu: return run(std::integral_constant<Act, Act::silu>{});
  }
}

// With W = sw * (qw - zw) for a group, y is the sum over groups of sw * (x . qw - zw * sum(x)); with W = sw * qw + mw,
// qw being lifted codes, that of sw * x . qw + mw * sum(x). For 8-bit inputs, with
// x = sx * qx + ox for a row, it is sx times that of qx, and ox times the sum of W.
void product(const Inputs& in, const Weight& w, const After& after, int64_t row, int64_t row_end, int64_t panel,
             int64_t panel_end, float* y) {
  if (in.floats) return product_of<FLOAT_DIGITS>(in.floats, in, w, after, row, row_end, panel, panel_end, y);
  product_of<1>(in.codes, in, w, after, row, row_end, panel, panel_end, y);
}

}  // namespace AQ_ISA
}  // namespace aq
