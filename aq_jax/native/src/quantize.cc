// Groups of weights get grids and codes, while they are in the cache: their ranges, their grids, codes, packed bytes.
#include "set.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "flush.h"
#include "grids.h"
#include "scratch.h"
#include "search.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {
namespace {

constexpr int64_t CHUNK = 64;      // codes that are packed at a time
constexpr int64_t BLOCK = 4096;    // elements of a block of groups
constexpr int64_t HELD = 4096;     // codes that are held before they are packed; a group's begin and end there

// The smallest and the largest element, in some lane; where one is not finite, `poison` has a lane that is NaN.
void range(const float* x, int64_t count, F& least_of, F& most_of, F& poison) {
  F low[4], high[4], bad[4] = {};
  const F first = splat(x[0]);
  for (int i = 0; i < 4; ++i) low[i] = high[i] = first;
  auto add = [&](F v, int i) {
    low[i] = min(v, low[i]), high[i] = max(v, high[i]);
    bad[i] = fma(v, F{}, bad[i]);
  };
  int64_t at = 0;
  for (; at + 4 * LANES <= count; at += 4 * LANES)
    for (int i = 0; i < 4; ++i) add(load<F>(x + at + i * LANES), i);
  for (; at + LANES <= count; at += LANES) add(load<F>(x + at), 0);
  if (at < count) add(first_repeated(x + at, count - at), 1);
  least_of = min(min(low[0], low[1]), min(low[2], low[3]));
  most_of = max(max(high[0], high[1]), max(high[2], high[3]));
  poison += (bad[0] + bad[1]) + (bad[2] + bad[3]);
}

// The range of the finite elements, (0, 0) if there are none; return whether all are.
bool finite_range(const float* x, int64_t count, float& low, float& high) {
  bool all = true;
  low = std::numeric_limits<float>::infinity(), high = -low;
  for (int64_t i = 0; i < count; ++i) {
    const bool is = std::fabs(x[i]) <= FLOAT_MAX;
    if (is) low = std::min(low, x[i]), high = std::max(high, x[i]);
    all &= is;
  }
  if (low > high) low = high = 0;
  return all;
}

// The ranges of some groups, one in each lane; return whether all elements are finite.
bool ranges(const float* x, int64_t groups, int64_t size, F& low, F& high) {
  F lows[LANES], highs[LANES], poison = F{};
  for (int64_t i = 0; i < groups; ++i) range(x + i * size, size, lows[i], highs[i], poison);
  for (int64_t i = groups; i < LANES; ++i) lows[i] = highs[i] = F{};
  if (sum(poison) == 0) {
    if (groups > 2) {
      low = join_lanes(lows, min), high = join_lanes(highs, max);
    } else {
      low = high = F{};
      for (int64_t i = 0; i < groups; ++i) low[i] = least(lows[i]), high[i] = -least(-highs[i]);
    }
    return true;
  }
  float one[LANES] = {}, other[LANES] = {};
  bool all = true;
  for (int64_t i = 0; i < groups; ++i) all &= finite_range(x + i * size, size, one[i], other[i]);
  low = load<F>(one), high = load<F>(other);
  return all;
}

Grid absmax(F low, F high, int bits) {
  const float share = float(1.0 / ((1 << (bits - 1)) - 1));
  const Grid grid = {max(high, negative(low)) * splat(share), F{}, F{}, I{}};
  return fix_degenerate(grid, low, high, bits, Rounding::mid_tread);
}

Grid minmax(F low, F high, int bits) {
  const float share = float(1.0 / ((1 << bits) - 1)), qmin = float(-(1 << (bits - 1)));
  auto product = [](F a, F b) { return clip(a * b, -FLOAT_MAX, FLOAT_MAX); };
  const F scale = product(high, splat(share)) - product(low, splat(share));
  const F zero = splat(qmin) - product(low, splat(1) / clip(scale, SCALE_MIN, SCALE_MAX));
  return fix_degenerate({scale, zero, low, I{}}, low, high, bits, Rounding::affine);
}

// What rounding has in common for all groups. Codes are in the low bits of a float to which `magic` has been added.
struct Levels {
  F low, high, magic, nan, first;  // a code is the sum without `magic`, and `first` more

  Levels(int bits, Rounding rounding, bool unsigned_codes) {
    const float half = float(1 << (bits - 1));
    const bool affine = rounding == Rounding::affine;
    low = splat(affine ? 0 : -half), high = splat(affine ? 2 * half - 1 : half - 1);
    magic = splat(0x1.8p23f + (affine ? -half : 0) + (unsigned_codes ? half : 0));
    nan = splat(affine ? half : 0);  // the code of NaN is 0
    first = splat(unsigned_codes ? -half : 0);
  }
};

// Of a group. Times `unit`, weights are around 1, and levels `step` apart.
struct One {
  float inverse, base, zero, step, unit, least, most;
  double unit_squared;  // of what such weights are multiples of
};

struct Sums {
  F ww, wd, dd;
};

// Weights that come next, in memory: fetched while others are encoded, since processors stop at the end of each page.
struct Next {
  uintptr_t address;
  int64_t bytes;  // of a weight

  void skip(int64_t count) { address += count * bytes; }

  void fetch(int64_t first) const {
    const uintptr_t from = address + first * bytes;
    for (int64_t i = 0; i < 4 * LANES * bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(from + i));
  }
};

// Codes of a group, and sums over it. If it is SOUND, its elements and its grid are finite, and no number can be NaN.
template <Rounding ROUNDING, bool SUMS, bool SOUND>
void encode(const float* x, int64_t count, const Levels& levels, const One& one, Next next, int8_t* codes,
            Sums& sums) {
  const F inverse = splat(one.inverse), base = splat(one.base);
  const F low = levels.low, high = levels.high, magic = levels.magic, nan = levels.nan;  // in registers
  auto round = [=](F v) {
    F q = (ROUNDING == Rounding::affine ? v - base : v) * inverse;
    const I number = q == q;
    if (ROUNDING == Rounding::mid_rise) q = floor(q);
    q = min(max(q, low), high);
    return (SOUND ? q : number ? q : nan) + magic;
  };
  auto add = [&](F v, F rounded, int64_t left) {
    const F code = (rounded - splat(0x1.8p23f)) + levels.first;
    if (!SOUND) v = v == v ? min(max(v, splat(one.least)), splat(one.most)) : F{};  // as the search sees it
    const F level = ROUNDING == Rounding::mid_tread ? code : code - splat(one.zero);
    F s = v * splat(one.unit), d = s - level * splat(one.step);
    if (left < LANES) {
      float parts[2][LANES] = {};
      std::memcpy(parts[0], &s, 4 * left), std::memcpy(parts[1], &d, 4 * left);
      s = load<F>(parts[0]), d = load<F>(parts[1]);
    }
    sums.ww = fma(s, s, sums.ww), sums.wd = fma(s, d, sums.wd), sums.dd = fma(d, d, sums.dd);
  };
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    I four[4];
    next.fetch(i);
    for (int n = 0; n < 4; ++n) {
      const F v = load<F>(x + i + n * LANES), rounded = round(v);
      four[n] = as_int(rounded);
      if (SUMS) add(v, rounded, LANES);
    }
    store_bytes(codes + i, four);
  }
  for (; i + LANES <= count; i += LANES) {
    const F v = load<F>(x + i), rounded = round(v);
    store_bytes(codes + i, as_int(rounded));
    if (SUMS) add(v, rounded, LANES);
  }
  if (i == count) return;
  const F v = load_part(x + i, count - i), rounded = round(v);
  int8_t last[LANES];
  store_bytes(last, as_int(rounded));
  std::memcpy(codes + i, last, count - i);
  if (SUMS) add(v, rounded, count - i);
}

typedef uint64_t L __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

// Codes, a byte each, become a bit stream: eight at a time, by pairs. What is behind them must be zero up to 64.
template <int BITS>
void pack(const uint8_t* codes, int64_t count, uint8_t* to) {
  constexpr int WORDS = LANES / 2;
  auto some = [](const uint8_t* codes, uint8_t* to) {  // which writes 8 - BITS bytes more
    for (int i = 0; i < 8; i += WORDS) {
      L x = load<L>(codes + 8 * i);
      x = (x & 0x00ff00ff00ff00ff) | (x >> 8 & 0x00ff00ff00ff00ff) << BITS;
      x = (x & 0x0000ffff0000ffff) | (x >> 16 & 0x0000ffff0000ffff) << 2 * BITS;
      if (BITS == 2) {
        store_bytes(reinterpret_cast<int8_t*>(to) + BITS * i, (I)x);
        continue;
      }
      if (BITS == 4) {
        store(to + BITS * i, __builtin_convertvector((W)x, H));
        continue;
      }
      x = (x & 0x00000000ffffffff) | x >> 32 << 4 * BITS;
      uint64_t words[WORDS];
      store(words, x);
      for (int k = 0; k < WORDS; ++k) std::memcpy(to + BITS * (i + k), words + k, 8);
    }
  };
  for (; count >= 2 * CHUNK; count -= CHUNK, codes += CHUNK, to += 8 * BITS) some(codes, to);
  for (; count > 0; count -= CHUNK, codes += CHUNK, to += 8 * BITS) {
    uint8_t last[8 * BITS + 8];
    some(codes, last);
    std::memcpy(to, last, (std::min(count, CHUNK) * BITS + 7) / 8);
  }
}

// Codes on their way to memory: as they are, or packed a cache's worth at a time.
class Writer {
 public:
  Writer(const Groups& in, int64_t group) : bits_(in.packed && in.bits < 8 ? in.bits : 0) {
    to_ = in.codes + (bits_ ? group * in.group * bits_ / 8 : group * in.group);
  }

  // Room for so many codes, at most HELD, which must be filled.
  int8_t* room(int64_t count) {
    if (!bits_) {
      to_ += count;
      return reinterpret_cast<int8_t*>(to_ - count);
    }
    if (held_ + count > HELD) flush();
    held_ += count;
    return held_codes_ + held_ - count;
  }

  void flush() {
    if (!held_) return;
    constexpr decltype(&pack<2>) packers[] = {pack<2>, pack<3>, pack<4>, pack<5>, pack<6>, pack<7>};
    std::memset(held_codes_ + held_, 0, (CHUNK - held_ % CHUNK) % CHUNK);
    packers[bits_ - 2](reinterpret_cast<uint8_t*>(held_codes_), held_, to_);
    to_ += held_ * bits_ / 8;
    held_ = 0;
  }

 private:
  int bits_;
  uint8_t* to_;
  int64_t held_ = 0;
  alignas(64) int8_t held_codes_[HELD];
};

template <Rounding ROUNDING, bool SUMS, bool SOUND>
void write_group(const float* x, int64_t count, const Levels& levels, const One& one, Next next, Writer& writer,
                 double* to) {
  double totals[3] = {};
  constexpr int64_t STEP = SUMS ? 64 * LANES : HELD;  // more numbers would not add up in float32
  for (int64_t at = 0; at < count; at += STEP) {
    const int64_t size = std::min(STEP, count - at);
    Sums sums = {};
    encode<ROUNDING, SUMS, SOUND>(x + at, size, levels, one, next, writer.room(size), sums);
    next.skip(size);
    if (SUMS) totals[0] += sum(sums.ww), totals[1] += sum(sums.wd), totals[2] += sum(sums.dd);
  }
  if (SUMS)
    for (int i = 0; i < 3; ++i) to[i] = totals[i] * one.unit_squared;
}

template <bool SUMS, bool SOUND>
auto choose(Rounding rounding) {
  return rounding == Rounding::mid_tread  ? write_group<Rounding::mid_tread, SUMS, SOUND>
         : rounding == Rounding::mid_rise ? write_group<Rounding::mid_rise, SUMS, SOUND>
                                          : write_group<Rounding::affine, SUMS, SOUND>;
}

}  // namespace

int quantize(const Groups& in, int64_t first, int64_t last) {
  const Flush flush;
  const Rounding rounding = rounding_of(in.method);
  const bool searches = in.method != Method::absmax && in.method != Method::minmax;
  const int64_t most = searches ? searched_together(in.group)
                                : std::min<int64_t>(LANES, std::max<int64_t>(1, BLOCK / in.group));
  const int64_t widest = in.halves ? most * in.group : 0, searched = searches ? search_floats(in.group) : 0;
  Scratch scratch(Scratch::bytes<float>(widest) + Scratch::bytes<float>(searched));
  float* widened = scratch.take<float>(widest);
  float* elements = scratch.take<float>(searched);
  const Levels levels(in.bits, rounding, in.packed && in.bits < 8);
  const auto write_sound = in.sums ? choose<true, true>(rounding) : choose<false, true>(rounding);
  const auto write_any = in.sums ? choose<true, false>(rounding) : choose<false, false>(rounding);
  Writer writer(in, first);
  int flags = 0;
  int64_t groups;
  for (int64_t g = first; g < last; g += groups) {
    const int64_t start = g * in.group;
    groups = std::min(most, last - g);
    if (groups > 1 && start + groups * in.group > in.count) --groups;  // the last, which is short, goes alone
    const int64_t count = std::min(in.count - start, groups * in.group), size = count / groups;
    const float* x = widened;
    if (in.floats) {
      x = in.floats + start;
    } else {
      for (int64_t i = 0; i < count; i += LANES)
        store_part(widened + i, load_part(in.halves + start + i, count - i), count - i);
    }
    const int64_t ahead = start + std::min(count, BLOCK);
    Next next = in.floats ? Next{uintptr_t(in.floats + ahead), 4} : Next{uintptr_t(in.halves + ahead), 2};
    F low, high;
    const bool finite = ranges(x, groups, size, low, high);
    if (!finite) flags |= UNSOUND;
    const Grid grid = searches                         ? search(in, x, groups, size, low, high, elements)
                      : in.method == Method::absmax ? absmax(low, high, in.bits)
                                                    : minmax(low, high, in.bits);
    const F top = max(high, negative(low)), inverse = splat(1) / grid.scale;
    const F power = as_float(as_int(clip(top, SCALE_MIN, SCALE_MAX)) & 0x7f800000), unit = splat(1) / power;
    store_part(in.scale + g, grid.scale, groups);
    store_part(in.zero + g, grid.zero, groups);
    float lanes[7][LANES], tops[LANES], exponent[LANES];
    store(exponent, power);
    store(lanes[0], inverse), store(lanes[1], grid.base), store(lanes[2], grid.zero);
    store(lanes[3], grid.scale * unit), store(lanes[4], unit), store(lanes[5], low), store(lanes[6], high);
    store(tops, top);
    for (int64_t i = 0; i < groups; ++i) {
      if (!grid.sound[i]) flags |= UNSOUND;
      if (tops[i] == 0) flags |= ZEROS;
      const double square = double(exponent[i]) * exponent[i];
      const One one = {lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i],
                       lanes[4][i], lanes[5][i], lanes[6][i], square};
      const auto write = finite && grid.sound[i] ? write_sound : write_any;
      write(x + i * size, size, levels, one, next, writer, in.sums ? in.sums + 3 * (g + i) : nullptr);
      next.skip(size);
    }
    writer.flush();
  }
  return flags;
}

}  // namespace AQ_ISA
}  // namespace aq
