// The search of quantizers/mse.py: alternating least squares and rounding, from several starts, for a group in each
// lane; a long group is spread over all lanes. What a group gets depends on nothing but its elements.
#include "search.h"

#include <algorithm>

#include "grids.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {
namespace {

constexpr int64_t LONG = 2048;               // groups of more elements are spread over the lanes
constexpr int64_t CHUNK = 256;               // vectors that are summed before their sum is added to others
constexpr int STORED = 7;                    // bits of the mantissa of scales and zero points
constexpr int TOGETHER = LANES == 16 ? 4 : 2;  // starts whose sums are in registers

// Elements [steps][LANES], scaled so that the largest magnitude of a group is around 1.
struct Elements {
  const float* x;
  int64_t steps;
  I last;       // which lanes of the last step are elements
  bool spread;  // all lanes are one group
  F low, high, count;
};

struct Trial {
  F scale, base;
};

struct Sums {
  F u, uu, uw, error;
};

constexpr float MAGIC = 0x1.8p23f;  // added to a number below 2^22, it leaves an integer in the low bits of the sum

// x y + MAGIC, to the nearest integer; or to the one below.
inline F rounded(F x, F y) { return fma(x, y, splat(MAGIC)); }
inline F rounded_down(F x, F y) {
#if defined(__AVX512VNNI__)
  constexpr int DOWN = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  return (F)_mm512_fmadd_round_ps((__m512)x, (__m512)y, (__m512)splat(MAGIC), DOWN);
#else
  return floor(x * y) + splat(MAGIC);
#endif
}

// Of sums, whose order is that of their bits: other units do this than add and multiply.
inline F between(F sum, I low, I high) {
#if defined(__AVX512VNNI__)
  return (F)_mm512_min_epi32(_mm512_max_epi32((__m512i)sum, (__m512i)low), (__m512i)high);
#elif defined(__AVX2__)
  return (F)_mm256_min_epi32(_mm256_max_epi32((__m256i)sum, (__m256i)low), (__m256i)high);
#else
  return (F)vminq_s32(vmaxq_s32((int32x4_t)sum, (int32x4_t)low), (int32x4_t)high);
#endif
}

// Over some elements: the sums of levels u that least squares needs, or the squared error of base + u scale.
template <Rounding ROUNDING, bool ERROR, bool PART>
void add_up(const float* x, int64_t steps, I part, float top, const Trial* trials, Sums* sums) {
  F inverse[TOGETHER], base[TOGETHER], scale[TOGETHER];
  Sums own[TOGETHER] = {};
  for (int t = 0; t < TOGETHER; ++t)
    inverse[t] = splat(1) / trials[t].scale, base[t] = trials[t].base, scale[t] = trials[t].scale;
  const I low = as_int(splat(MAGIC + (ROUNDING == Rounding::affine ? 0 : -top - 1))), high = as_int(splat(MAGIC + top));
  for (int64_t i = 0; i < steps; ++i) {
    const F v = load<F>(x + i * LANES);
    for (int t = 0; t < TOGETHER; ++t) {
      const F x = ROUNDING == Rounding::affine ? v - base[t] : v;
      const F sum = ROUNDING == Rounding::mid_rise ? rounded_down(x, inverse[t]) : rounded(x, inverse[t]);
      F u = between(sum, low, high) - splat(MAGIC);
      if (ROUNDING == Rounding::mid_rise) u += splat(0.5f);
      if (ERROR) {
        F d = fma(u, scale[t], ROUNDING == Rounding::affine ? base[t] - v : negative(v));
        if (PART) d = part ? d : F{};
        own[t].error = fma(d, d, own[t].error);
      } else {
        if (PART) u = part ? u : F{};
        if (ROUNDING == Rounding::affine) own[t].u += u;
        own[t].uu = fma(u, u, own[t].uu);
        own[t].uw = fma(u, v, own[t].uw);
      }
    }
  }
  for (int t = 0; t < TOGETHER; ++t) {
    sums[t].u += own[t].u, sums[t].uu += own[t].uu, sums[t].uw += own[t].uw, sums[t].error += own[t].error;
  }
}

F together(F lanes, bool spread) { return spread ? splat(sum(lanes)) : lanes; }

template <Rounding ROUNDING, bool ERROR>
void add_up_all(const Elements& in, float top, int trials, const Trial* trial, Sums* sums) {
  std::fill(sums, sums + trials, Sums{});
  const bool part = in.spread && !in.last[LANES - 1];
  const int64_t whole = in.steps - part;
  for (int64_t at = 0; at < whole; at += CHUNK)
    for (int t = 0; t < trials; t += TOGETHER)
      add_up<ROUNDING, ERROR, false>(in.x + at * LANES, std::min(CHUNK, whole - at), in.last, top, trial + t, sums + t);
  for (int t = 0; part && t < trials; t += TOGETHER)
    add_up<ROUNDING, ERROR, true>(in.x + whole * LANES, 1, in.last, top, trial + t, sums + t);
  for (int t = 0; t < trials; ++t) {
    Sums& one = sums[t];
    one = Sums{together(one.u, in.spread), together(one.uu, in.spread), together(one.uw, in.spread),
           together(one.error, in.spread)};
  }
}

F total(const Elements& in) {
  F all = F{};
  for (int64_t at = 0; at < in.steps; at += CHUNK) {
    F part = F{};
    for (int64_t i = at; i < std::min(in.steps, at + CHUNK); ++i) part += load<F>(in.x + i * LANES);
    all += part;
  }
  return together(all, in.spread);
}

F bounded(F scale) { return clip(scale, SCALE_MIN, SCALE_MAX); }

// The line through (level, weight) of least squares; a group with one code throughout keeps its own.
template <Rounding ROUNDING>
void refine(const Sums& s, F w, F count, Trial& trial) {
  const F one = splat(1);
  if (ROUNDING != Rounding::affine) {
    const I fits = s.uu > 0;
    trial.scale = bounded(fits ? s.uw / (fits ? s.uu : one) : trial.scale);
    return;
  }
  const F spread = s.uu - s.u * s.u / count;
  const F scale = (s.uw - s.u * w / count) / (spread > 0 ? spread : one);
  const I fits = (spread > 0) & (scale > 0);
  trial.base = fits ? (w - scale * s.u) / count : trial.base;
  trial.scale = bounded(fits ? scale : trial.scale);
}

template <Rounding ROUNDING>
Grid find(const Elements& in, const Search& search, int bits) {
  const float half = float(1 << (bits - 1)), n = 2 * half - 1, top = ROUNDING == Rounding::affine ? n : half - 1;
  const bool affine = ROUNDING == Rounding::affine;
  const int trials = (int(search.count) + TOGETHER - 1) / TOGETHER * TOGETHER;
  Trial trial[MAX_STARTS + TOGETHER];
  Sums sums[MAX_STARTS + TOGETHER];
  const F w = total(in), mean = w / in.count, largest = max(in.high, negative(in.low));
  for (int t = 0; t < trials; ++t) {
    const F fraction = splat(search.starts[std::min(t, int(search.count) - 1)]);
    if (affine) {
      const F scale = (in.high - in.low) * fraction / splat(n);
      const F middle = mean + fraction * ((in.low + in.high) / splat(2) - mean);
      trial[t] = Trial{bounded(scale), middle - scale * splat(n / 2)};
    } else {
      trial[t] = Trial{bounded(largest * fraction / splat(ROUNDING == Rounding::mid_tread ? top : top + 0.5f)), F{}};
    }
  }
  for (int64_t round = 0; round < search.rounds; ++round) {
    add_up_all<ROUNDING, false>(in, top, trials, trial, sums);
    for (int t = 0; t < trials; ++t) refine<ROUNDING>(sums[t], w, in.count, trial[t]);
  }
  // As they are stored, with 8 bits of mantissa; a zero point beyond 2^8 could not be told from its neighbours.
  F zero[MAX_STARTS + TOGETHER];
  for (int t = 0; t < trials; ++t) {
    Trial& one = trial[t];
    zero[t] = splat(ROUNDING == Rounding::mid_rise ? -0.5f : 0);
    if (affine) one.scale = max(one.scale, magnitude(one.base) * splat(0x1p-8f));
    one.scale = bounded(round_mantissa(one.scale, STORED));
    if (!affine) continue;
    zero[t] = round_mantissa(splat(-half) - one.base / one.scale, STORED);
    one.base = (splat(-half) - zero[t]) * one.scale;
  }
  add_up_all<ROUNDING, true>(in, top, trials, trial, sums);
  Grid best = {trial[0].scale, zero[0], trial[0].base, I{}};
  F least = sums[0].error;
  for (int t = 1; t < trials; ++t) {
    const I better = sums[t].error < least;
    best.scale = better ? trial[t].scale : best.scale;
    best.zero = better ? zero[t] : best.zero;
    best.base = better ? trial[t].base : best.base;
    least = better ? sums[t].error : least;
  }
  return best;
}

}  // namespace

int64_t searched_together(int64_t group) { return group > LONG ? 1 : LANES; }

int64_t search_floats(int64_t group) { return (group > LONG ? group + LANES : group * LANES) + LANES; }

Grid search(const Groups& in, const float* x, int64_t groups, int64_t size, F low, F high, float* elements) {
  const bool spread = in.group > LONG;
  if (spread) low = splat(low[0]), high = splat(high[0]);
  const F unit = round_mantissa(clip(max(high, negative(low)), SCALE_MIN, SCALE_MAX), 0), factor = splat(1) / unit;
  auto put = [&](int64_t step, F v) {  // infinities count as the nearest finite element, NaN as 0
    store(elements + step * LANES, (v == v ? min(max(v, low), high) : F{}) * factor);
  };
  Elements made = {elements, spread ? (size + LANES - 1) / LANES : size, I{}, spread, low * factor, high * factor,
                   splat(float(size))};
  for (int i = 0; i < LANES; ++i) made.last[i] = i < (size % LANES ? size % LANES : LANES) ? -1 : 0;
  if (spread) {
    for (int64_t i = 0; i < made.steps; ++i) put(i, load_part(x + i * LANES, size - i * LANES));
    // What is behind the end weighs nothing.
    float* end = elements + (made.steps - 1) * LANES;
    store(end, made.last ? load<F>(end) : F{});
  } else {
    for (int64_t at = 0; at < size; at += LANES) {
      F block[LANES];
      for (int64_t i = 0; i < LANES; ++i)
        block[i] = i < groups ? load_part(x + i * size + at, size - at) : F{};
      turn(block);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, size - at); ++i) put(at + i, block[i]);
    }
  }
  const Rounding rounding = rounding_of(in.method);
  Grid found = rounding == Rounding::mid_tread  ? find<Rounding::mid_tread>(made, in.search, in.bits)
               : rounding == Rounding::mid_rise ? find<Rounding::mid_rise>(made, in.search, in.bits)
                                                : find<Rounding::affine>(made, in.search, in.bits);
  found.scale *= unit, found.base *= unit;
  return fix_degenerate(found, low, high, in.bits, rounding);
}

}  // namespace AQ_ISA
}  // namespace aq
