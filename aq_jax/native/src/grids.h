// The grids of a group in each lane: those of core/grid.py, bit for bit.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {

constexpr float SCALE_MIN = 0x1p-126f, SCALE_MAX = 0x1p126f, FLOAT_MAX = 0x1.fffffep127f;

struct Grid {
  F scale, zero, base;
  I sound;  // -1 or 0
};

enum class Rounding { mid_tread, mid_rise, affine };

constexpr Rounding rounding_of(Method method) {
  return method == Method::mid_rise ? Rounding::mid_rise
         : method == Method::minmax || method == Method::affine ? Rounding::affine
                                                                     : Rounding::mid_tread;
}

inline F clip(F x, float low, float high) { return min(max(x, splat(low)), splat(high)); }
inline F magnitude(F x) { return as_float(as_int(x) & 0x7fffffff); }
inline F negative(F x) { return as_float(as_int(x) ^ INT32_MIN); }
inline I finite(F x) { return magnitude(x) <= FLOAT_MAX; }

inline F floor(F x) {
#if defined(__AVX512VNNI__)
  return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (F)_mm256_floor_ps((__m256)x);
#else
  return (F)vrndmq_f32((float32x4_t)x);
#endif
}

// To the nearest integer, ties to even, of numbers below 2^22.
inline F nearest(F x) { return (x + splat(0x1.8p23f)) - splat(0x1.8p23f); }

// Rounded to so many bits of the mantissa, ties to even.
inline F round_mantissa(F x, int bits) {
  const int drop = 23 - bits;
  const I raw = as_int(x), odd = (raw >> drop) & 1;
  return as_float(((raw + ((1 << (drop - 1)) - 1) + odd) >> drop) << drop);
}

// Make constant groups exact, and force scales into their bounds.
inline Grid fix_degenerate(Grid grid, F low, F high, int bits, Rounding rounding) {
  const F one = splat(1), zeros = F{}, top = magnitude(high);
  const float qmin = float(-(1 << (bits - 1)));
  const I narrow = (high - low <= top * splat(0x1p-20f)) & (top >= splat(0x1p-102f));
  const I constant = (low == high) | ((grid.scale == zeros) & narrow), zero = constant & (high == zeros);
  F exact = zero ? one : top;
  if (rounding == Rounding::mid_rise) {
    exact = zero ? one : splat(2) * exact;
    grid.zero = zero ? zeros : splat(-0.5f);
  } else {
    grid.zero = constant ? zeros : grid.zero;
  }
  grid.base = constant ? splat(qmin) * exact : grid.base;
  grid.scale = constant ? exact : grid.scale;
  grid.sound = (grid.scale >= splat(SCALE_MIN)) & (grid.scale <= splat(SCALE_MAX));
  if (rounding == Rounding::affine) grid.sound &= finite(high - low) & finite(grid.base);
  grid.scale = clip(grid.scale, SCALE_MIN, SCALE_MAX);
  return grid;
}

}  // namespace AQ_ISA
}  // namespace aq
