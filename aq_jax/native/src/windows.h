// Fields of a bit stream that lie at equal distances, one in each lane.
#pragma once

#include "simd.h"

namespace aq {
namespace AQ_ISA {

constexpr int RUN = 16;  // fields at a time, which lie in 16 bytes with the bits before them

// Where the fields of a run lie that begins at one bit of a byte: each lane takes two or three bytes, and shifts them.
struct Window {
  U bytes[RUN / LANES];
  I shift[RUN / LANES];
};

// The windows of the eight bits of a byte, for fields that `each` lanes share, `bits` apart; 16 bytes lie in every 128
// bits of a vector.
inline void make_windows(int bits, int each, int octets, Window (&windows)[8]) {
  for (int first = 0; first < 8; ++first) {
    uint8_t bytes[4 * RUN];
    int32_t shift[RUN];
    for (int i = 0; i < RUN; ++i) {
      const int bit = first + bits * (i / each);
      shift[i] = bit % 8;
      for (int k = 0; k < 4; ++k) bytes[4 * i + k] = k < octets ? bit / 8 + k : 0x80;  // which gives zero
    }
    std::memcpy(windows[first].bytes, bytes, sizeof bytes);
    std::memcpy(windows[first].shift, shift, sizeof shift);
  }
}

// Fields, with what else is above them.
inline I take(const uint8_t* sixteen, U bytes, I shift) {
#if defined(__AVX512VNNI__)
  const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)sixteen));
  return (I)_mm512_srlv_epi32(_mm512_shuffle_epi8(all, (__m512i)bytes), (__m512i)shift);
#elif defined(__AVX2__)
  const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)sixteen));
  return (I)_mm256_srlv_epi32(_mm256_shuffle_epi8(all, (__m256i)bytes), (__m256i)shift);
#else
  const uint8x16_t found = vqtbl1q_u8(vld1q_u8(sixteen), (uint8x16_t)bytes);
  return (I)vshlq_u32((uint32x4_t)found, (int32x4_t)-shift);
#endif
}

}  // namespace AQ_ISA
}  // namespace aq
