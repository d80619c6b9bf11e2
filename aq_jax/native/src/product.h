// What products of few rows and of many have in common, and so do those of float inputs and of 8-bit ones.
//
// Sums of integers are exact. Where bytes are multiplied fast, floats are made integers, too: three bytes, the digits
// of a number of 24 bits, on the scale of the largest of 128 inputs. Otherwise codes become floats.
#pragma once

#include <algorithm>

#include "codes.h"
#include "grids_of.h"
#include "set.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {

constexpr int FLOAT_DIGITS = FAST_BYTES ? 3 : 0;

// Inputs of one byte, of so many, or of floats (0). Products with codes are summed over parts of a group, which have
// one scale of their inputs.
template <int DIGITS>
struct Kind {
  typedef int8_t Input;
  typedef int32_t Sum;
  typedef I Sums;
  static constexpr int64_t PART = DIGITS == 1 ? int64_t(1) << 40 : 128;
  static constexpr int LINES = DIGITS;  // rows of bytes for a row of inputs
};

template <>
struct Kind<0> {
  typedef float Input;
  typedef float Sum;
  typedef F Sums;
  static constexpr int64_t PART = 128;
  static constexpr int LINES = 1;
};

// Inputs of a part: x ~ scale * digits; the sum of the numbers that these make, and the sum of each digit. Floats are
// x / scale, and less by the power of two that their codes are multiplied by (float_of).
template <int DIGITS>
struct Part {
  float scale, sum;
  int32_t digits[DIGITS ? DIGITS : 1];
};

// Rows of inputs, each group filled up with zeros.
template <int DIGITS>
struct Operand {
  const typename Kind<DIGITS>::Input* x;  // [rows, LINES, stride]
  const Part<DIGITS>* parts;              // [parts, rows]
  int64_t stride;
};

// total + scale of the weight * scale of the inputs * (dot - zero point * sum of inputs), of a part; or, where codes
// are lifted (by 0 or more), total + scale * scale of the inputs * dot + minimum * sum. `added` was added to the codes.
template <int DIGITS>
inline F join(F total, const typename Kind<DIGITS>::Sums (&dots)[Kind<DIGITS>::LINES], const Part<DIGITS>& part,
              GridAt grid, int64_t lane, int added, int lift) {
  F dot;
  if constexpr (DIGITS == 0) {
    dot = lift > 0 ? fma(splat(float(lift)), splat(part.sum), dots[0]) : dots[0];
  } else {
    if (lift > 0) added -= lift;
    dot = to_float(dots[0] - added * part.digits[0]);
    for (int d = 1; d < DIGITS; ++d) dot = fma(dot, splat(256), to_float(dots[d] - added * part.digits[d]));
  }
  const F scales = load<F>(grid.scale + lane), offset = load<F>(grid.offset + lane);
  const F scale = DIGITS == 1 ? scales : scales * splat(part.scale);
  if (lift >= 0) return fma(scale, dot, fma(offset, splat(part.scale * part.sum), total));
  return fma(scale, fma(offset, splat(-part.sum), dot), total);
}

// Make y of the totals of rows, `between` floats apart, for `count` outputs from `at`, and compute what follows.
void finish(const Inputs& in, const Weight& w, const After& after, int64_t row, int64_t rows, int64_t at, int64_t count,
            const float* totals, int64_t between, float* y);

// Products of few rows, for which codes are not unpacked in memory; product_few.cc. They have the bits of many rows.
template <int DIGITS>
void product_few(const Operand<DIGITS>& x, const Inputs& in, const Weight& w, const After& after, int64_t row,
                 int64_t rows, int64_t panel, int64_t panel_end, float* y);

}  // namespace AQ_ISA
}  // namespace aq
