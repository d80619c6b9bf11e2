// The AVX-512 intrinsics that the kernels use, made of AVX2's, to run those kernels where no processor has AVX-512.
// Included before all else, so that the compiler's own headers see which instructions there are.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512VNNI__ 1

namespace by_avx2 {

template <class To, class From>
inline To as(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from, "bits are copied");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Halves {
  __m256i low, high;
};

// What an operation on 256 bits gives for both halves.
template <class V, class Operation, class... Vs>
inline V each_half(Operation operation, Vs... vs) {
  return as<V>(Halves{as<__m256i>(operation(as<Halves>(vs).low...)), as<__m256i>(operation(as<Halves>(vs).high...))});
}

// What an operation on one element gives for each of 16 lanes.
template <class V, class Operation>
inline V each_lane(Operation operation) {
  struct {
    decltype(operation(0)) lane[16];
  } made;
  for (int n = 0; n < 16; ++n) made.lane[n] = operation(n);
  return as<V>(made);
}

inline __m256 f(__m256i x) { return _mm256_castsi256_ps(x); }

#define AQ_OF_TWO(name, V, call) \
  inline V name(V x, V y) {      \
    return each_half<V>([](__m256i a, __m256i b) { return call; }, x, y); \
  }
AQ_OF_TWO(max_ps, __m512, _mm256_max_ps(f(a), f(b)))
AQ_OF_TWO(min_ps, __m512, _mm256_min_ps(f(a), f(b)))
AQ_OF_TWO(max_epi32, __m512i, _mm256_max_epi32(a, b))
AQ_OF_TWO(min_epi32, __m512i, _mm256_min_epi32(a, b))
AQ_OF_TWO(srlv_epi32, __m512i, _mm256_srlv_epi32(a, b))
AQ_OF_TWO(shuffle_epi8, __m512i, _mm256_shuffle_epi8(a, b))

inline __m512 fmadd_ps(__m512 x, __m512 y, __m512 z) {
  return each_half<__m512>([](__m256i a, __m256i b, __m256i c) { return _mm256_fmadd_ps(f(a), f(b), f(c)); }, x, y, z);
}

// Rounded downwards: there is no such instruction, but a mode, of which the compiler knows nothing.
inline __m512 fmadd_down(__m512 x, __m512 y, __m512 z) {
  return each_half<__m512>(
      [](__m256i a, __m256i b, __m256i c) {
        const unsigned nearest = _mm_getcsr(), down = (nearest & ~0x6000u) | 0x2000u;
        asm volatile("vldmxcsr %1\n\tvfmadd213ps %4, %3, %0\n\tvldmxcsr %2"
                     : "+x"(a)
                     : "m"(down), "m"(nearest), "x"(b), "x"(c));
        return a;
      },
      x, y, z);
}

inline __m512 floor_ps(__m512 x) {
  return each_half<__m512>([](__m256i a) { return _mm256_floor_ps(f(a)); }, x);
}
inline __m512i cvtps_epi32(__m512 x) {
  return each_half<__m512i>([](__m256i a) { return _mm256_cvtps_epi32(f(a)); }, x);
}

inline __m512i dpbusd(__m512i sums, __m512i w, __m512i x) {
  struct Bytes {
    uint8_t at[16][4];
  };
  struct Words {
    uint32_t at[16];
  };
  const Bytes a = as<Bytes>(w), b = as<Bytes>(x);
  Words sum = as<Words>(sums);
  for (int n = 0; n < 16; ++n)
    for (int k = 0; k < 4; ++k) sum.at[n] += uint32_t(a.at[n][k] * int8_t(b.at[n][k]));
  return as<__m512i>(sum);
}

inline __m512 maskz_loadu(uint32_t mask, const float* p) {
  return each_lane<__m512>([&](int n) { return mask >> n & 1 ? p[n] : 0.0f; });
}
inline void mask_storeu(float* p, uint32_t mask, __m512 x) {
  for (int n = 0; n < 16; ++n)
    if (mask >> n & 1) p[n] = x[n];
}
inline __m512 permute(__m512i order, __m512 x) {
  typedef int32_t Lanes __attribute__((vector_size(64)));
  return each_lane<__m512>([&](int n) { return x[((Lanes)order)[n] & 15]; });
}
inline __m128i low_bytes(__m512i x) {
  typedef int32_t Lanes __attribute__((vector_size(64)));
  return each_lane<__m128i>([&](int n) { return int8_t(((Lanes)x)[n]); });
}

inline __m128i second(__m128i x) { return _mm_srli_si128(x, 8); }
inline __m128i second(__m256i x) { return _mm256_extracti128_si256(x, 1); }
inline __m128i first(__m128i x) { return x; }
inline __m128i first(__m256i x) { return _mm256_castsi256_si128(x); }
#define AQ_WIDENED(name, V, From, call) \
  inline V name(From x) { return as<V>(Halves{as<__m256i>(call(first(x))), as<__m256i>(call(second(x)))}); }
AQ_WIDENED(cvtepi8, __m512i, __m128i, _mm256_cvtepi8_epi32)
AQ_WIDENED(cvtepu8, __m512i, __m128i, _mm256_cvtepu8_epi32)
AQ_WIDENED(cvtepu16, __m512i, __m256i, _mm256_cvtepu16_epi32)
AQ_WIDENED(cvtph, __m512, __m256i, _mm256_cvtph_ps)

template <class V>
inline V twice(__m256i x) {
  return as<V>(Halves{x, x});
}

}  // namespace by_avx2

#undef _mm512_fmadd_round_ps  // macros where nothing is optimized
#undef _mm512_roundscale_ps
#define _mm512_max_ps by_avx2::max_ps
#define _mm512_min_ps by_avx2::min_ps
#define _mm512_max_epi32 by_avx2::max_epi32
#define _mm512_min_epi32 by_avx2::min_epi32
#define _mm512_srlv_epi32 by_avx2::srlv_epi32
#define _mm512_shuffle_epi8 by_avx2::shuffle_epi8
#define _mm512_fmadd_ps by_avx2::fmadd_ps
#define _mm512_fmadd_round_ps(x, y, z, mode) by_avx2::fmadd_down(x, y, z)
#define _mm512_roundscale_ps(x, mode) by_avx2::floor_ps(x)
#define _mm512_cvtps_epi32 by_avx2::cvtps_epi32
#define _mm512_dpbusd_epi32 by_avx2::dpbusd
#define _mm512_maskz_loadu_ps by_avx2::maskz_loadu
#define _mm512_mask_storeu_ps by_avx2::mask_storeu
#define _mm512_permutexvar_ps by_avx2::permute
#define _mm512_cvtepi32_epi8 by_avx2::low_bytes
#define _mm512_cvtepi8_epi32 by_avx2::cvtepi8
#define _mm512_cvtepu8_epi32 by_avx2::cvtepu8
#define _mm512_cvtepu16_epi32 by_avx2::cvtepu16
#define _mm512_cvtph_ps by_avx2::cvtph
#define _mm512_broadcast_i32x4(x) by_avx2::twice<__m512i>(_mm256_broadcastsi128_si256(x))
#define _mm512_broadcast_f32x4(x) by_avx2::twice<__m512>(_mm256_broadcastsi128_si256(_mm_castps_si128(x)))
#define _mm512_set1_epi8(x) by_avx2::twice<__m512i>(_mm256_set1_epi8(x))
#define _mm512_set1_pd(x) by_avx2::twice<__m512d>(_mm256_castpd_si256(_mm256_set1_pd(x)))
#define _mm512_setzero_si512() by_avx2::twice<__m512i>(_mm256_setzero_si256())
#define _mm512_castpd_ps(x) ((__m512)(x))
