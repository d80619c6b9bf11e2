// The codes of a weight, out of the planes of bits that they are stored in.
//
// A line of 64 bytes has a word for each of 16 outputs. A plane has 8, 4, 2 or 1 bits of every code; a word of it holds
// 32 / bits of them. Codes come in steps of four, one in each byte of a word: step s is (word >> bits * s), masked.
// Widths without a plane of their own have two: 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1 bits, the lower ones first. A chunk
// is the fewest codes that fill a line of each plane: its lines of the first plane, then the one of the second.
#pragma once

#include <type_traits>
#include <utility>

#include "kernels.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {

constexpr int VECTORS = PANEL / LANES;  // in a panel
constexpr int LINE = 4 * PANEL;         // bytes

template <int BITS>
struct Planes {
  static constexpr int MAIN = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, REST = BITS - MAIN;
  static constexpr int STEPS = 8 / (REST ? REST : MAIN), LINES = STEPS * BITS / 8;
  static constexpr int HALF = 1 << (BITS - 1);  // codes are stored as code + HALF
  // What dot4 leaves added to them.
  static constexpr int ADDED = BITS == 8 ? OFFSET : HALF;
};

// Four codes in the bytes of each lane.
template <int BITS, int STEP, class Words = W>
inline Words step_of(const uint8_t* chunk) {
  using P = Planes<BITS>;
  constexpr int each = 8 / P::MAIN;
  const Words word = load<Words>(chunk + STEP / each * LINE) >> (P::MAIN * (STEP % each));
  if constexpr (P::REST == 0) {
    return BITS == 8 ? word : word & (0x01010101u * ((1 << BITS) - 1));
  } else {
    constexpr int shift = P::REST * STEP - P::MAIN;
    const Words other = load<Words>(chunk + (P::LINES - 1) * LINE);
    const Words moved = shift < 0 ? other << -shift : other >> shift;
    const Words low = word & (0x01010101u * ((1 << P::MAIN) - 1));
    return low | (moved & (0x01010101u * ((1 << BITS) - (1 << P::MAIN))));
  }
}

// Four codes, signed, in the highest bits of the bytes of each lane.
template <int BITS, int STEP>
inline W signed_step_of(const uint8_t* chunk) {
  using P = Planes<BITS>;
  constexpr int each = 8 / P::MAIN;
  if constexpr (P::REST) {
    return (step_of<BITS, STEP>(chunk) << (8 - BITS)) ^ 0x80808080u;
  } else {
    constexpr uint32_t ones = 0xFFFFFFFFu / ((1u << BITS) - 1);  // the lowest bit of each code
    const W word = load<W>(chunk + STEP / each * LINE) ^ (ones << (BITS - 1));
    return BITS == 8 ? word : (word << (8 - BITS - BITS * (STEP % each))) & (0x01010101u * (256 - (1 << (8 - BITS))));
  }
}

// Signed code J of four, times 2^(32 - bits), as a float: its byte becomes the highest of four, and the others zeros.
template <int J>
inline F float_of(W step) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  if constexpr (J == 1 || J == 2) {  // one instruction instead of two
    const W from = (W{0, 4, 8, 12, 0, 4, 8, 12} + J) << 24 | 0x808080;
    return to_float((I)_mm256_shuffle_epi8((__m256i)step, (__m256i)from));
  }
#endif
  const W moved = step << (24 - 8 * J);
  return to_float((I)(J ? moved & 0xFF000000 : moved));  // compilers would not see that the mask changes nothing
}

template <class Function, int... I>
inline __attribute__((always_inline)) void unrolled(const Function& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// Call f(0), f(1), ... of constants.
template <int N, class Function>
inline __attribute__((always_inline)) void unroll(const Function& f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}

// Call f(bits as a constant); one instance for each width.
template <class Function>
inline void with_bits(int64_t bits, const Function& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

}  // namespace AQ_ISA
}  // namespace aq
