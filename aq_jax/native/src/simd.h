// Vectors of one instruction set, and the few operations that the compilers' vector extensions do not have.
//
// Kernels are compiled once an instruction set, with -DAQ_ISA=... and that set's flags. Multiplication and addition are
// fused only where `fma` says so (-ffp-contract=off): otherwise compilers would round results differently.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace aq {
namespace AQ_ISA {

#if defined(__AVX512VNNI__)
constexpr int LANES = 16;      // floats in a vector
constexpr int MAX_ROWS = 12;   // rows of a tile: with two vectors a row, all but a few of 32 registers
#define AQ_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define AQ_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int MAX_ROWS = 4;
#define AQ_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define AQ_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
constexpr int LANES = 4;
constexpr int MAX_ROWS = 4;
#define AQ_LOW 0, 4, 1, 5
#define AQ_HIGH 2, 6, 3, 7
#endif

#if defined(__aarch64__)
constexpr int OFFSET = 0;  // what dot4 leaves added to the 8-bit codes of a weight
#else
constexpr int OFFSET = 128;
#endif

// Whether bytes are multiplied about four times as fast as floats.
#if defined(__AVX512VNNI__) || defined(__aarch64__)
constexpr bool FAST_BYTES = true;
#else
constexpr bool FAST_BYTES = false;
#endif

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t W __attribute__((vector_size(4 * LANES)));
typedef uint8_t U __attribute__((vector_size(4 * LANES)));  // bytes: four for each lane

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline F splat(float x) { return x - F{}; }  // adding 0 would be an operation, for the sake of -0

inline F to_float(I x) { return __builtin_convertvector(x, F); }

// The nearest integer, the even one of two.
inline I to_int(F x) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (I)_mm256_cvtps_epi32((__m256)x);
#else
  return (I)vcvtnq_s32_f32((float32x4_t)x);
#endif
}

inline F as_float(I x) { return (F)x; }
inline I as_int(F x) { return (I)x; }

// The larger and the smaller; where either is NaN, b.
inline F max(F a, F b) {
#if defined(__AVX512VNNI__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline F min(F a, F b) {
#if defined(__AVX512VNNI__)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// a * b + c, rounded once.
inline F fma(F a, F b, F c) {
#if defined(__AVX512VNNI__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

// Four int8 numbers in every lane.
inline I splat4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return I{} + four;
}

// AVX2 adds products of narrow codes in pairs, in 16 bits. These may be added, too, so many times before they overflow,
// and are widened then. 0: they are widened at once (of 6 bits two sums would fit, which gains nothing), or there is an
// instruction for all of it.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int PAIR_ROWS = 6;  // rows of a tile of such sums: with two vectors a row, all but four of 16 registers
constexpr int pair_sums(int64_t bits) { return bits < 6 ? 32767 / (2 * 128 * ((1 << bits) - 1)) : 0; }

inline I add_pairs(I sums, U w, I x) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  // An instruction by name: where it is an intrinsic, GCC 12 spills the sums of a tile.
  asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(pairs));
  return sums;
}
inline I add_widened(I sums, I pairs) { return sums + (I)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)); }
#else
constexpr int PAIR_ROWS = 0;
constexpr int pair_sums(int64_t) { return 0; }

I add_pairs(I sums, U w, I x);  // not there, and not called
I add_widened(I sums, I pairs);
#endif

// Whether dot4 is another one for narrow codes.
#if defined(__AVX512VNNI__)
constexpr bool NARROW_DIFFERS = false;
#else
constexpr bool NARROW_DIFFERS = true;
#endif

// In each lane, sums + the products of four unsigned bytes with four signed ones. Bytes of less than 8 bits, if NARROW;
// otherwise 128 - OFFSET is taken from them.
template <bool NARROW>
inline I dot4(I sums, U w, I x) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  if constexpr (NARROW) {  // two products fit in 16 bits
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    return sums + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  // Products of bytes are added in pairs of 16 bits only after they are widened: vpmaddubsw would saturate.
  __m256i even = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16((__m256i)w, 8);
  __m256i x0 = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8), x1 = _mm256_srai_epi16((__m256i)x, 8);
  __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even, x0), _mm256_madd_epi16(odd, x1));
  return sums + (I)both;
#else
  // Signed times signed: w - 128, and so without the offset.
  const uint8x16_t codes = NARROW ? (uint8x16_t)w : veorq_u8((uint8x16_t)w, vdupq_n_u8(0x80));
  return (I)vdotq_s32((int32x4_t)sums, vreinterpretq_s8_u8(codes), vreinterpretq_s8_s32((int32x4_t)x));
#endif
}

// Lanes of the lower halves in turn, and of the upper ones.
inline F low_halves(F a, F b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, AQ_LOW);
#else
  return __builtin_shuffle(a, b, I{AQ_LOW});
#endif
}

inline F high_halves(F a, F b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, AQ_HIGH);
#else
  return __builtin_shuffle(a, b, I{AQ_HIGH});
#endif
}

// Make rows columns. Each pass moves one bit of a number's row into its column.
inline void turn(F (&rows)[LANES]) {
  for (int pass = 1; pass < LANES; pass *= 2) {
    F next[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = low_halves(rows[i], rows[i + LANES / 2]);
      next[2 * i + 1] = high_halves(rows[i], rows[i + LANES / 2]);
    }
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
  }
}

// Of each row, its lanes joined by an operation, in the lane of the row's number. A pass halves the rows.
inline F join_lanes(F (&rows)[LANES], F (*join)(F, F)) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i)
      rows[i] = join(low_halves(rows[i], rows[i + half]), high_halves(rows[i], rows[i + half]));
  return rows[0];
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` floats, and zeros after them.
inline F load_part(const float* p, int64_t count) {
  if (count >= LANES) return load<F>(p);
#if defined(__AVX512VNNI__)
  return (F)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#elif defined(__AVX2__)
  return (F)_mm256_maskload_ps(p, first_lanes(count));
#else
  float part[LANES] = {};
  std::memcpy(part, p, 4 * count);
  return load<F>(part);
#endif
}

// The same of bfloat16, which are the upper halves of floats, and of signed bytes.
inline F load_part(const uint16_t* p, int64_t count) {
  typedef uint16_t H __attribute__((vector_size(2 * LANES)));
  H part = {};
  count < LANES ? std::memcpy(&part, p, 2 * count) : std::memcpy(&part, p, sizeof part);
  return (F)(__builtin_convertvector(part, W) << 16);
}

inline F load_part(const int8_t* p, int64_t count) {
  typedef int8_t B __attribute__((vector_size(LANES)));
  B part = {};
  count < LANES ? std::memcpy(&part, p, count) : std::memcpy(&part, p, sizeof part);
  return to_float(__builtin_convertvector(part, I));
}

// The first `count` floats, and the first one after them.
inline F first_repeated(const float* p, int64_t count) {
  F v = splat(p[0]);
  std::memcpy(&v, p, 4 * count);
  return v;
}

inline void store_part(float* p, F v, int64_t count) {
  if (count >= LANES) return store(p, v);
#if defined(__AVX512VNNI__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
#else
  std::memcpy(p, &v, 4 * count);
#endif
}

// The low byte of each lane, one after the other.
inline void store_bytes(int8_t* p, I v) {
#if defined(__AVX512VNNI__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i byte = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xff));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(byte), _mm256_extracti128_si256(byte, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
#else
  const int16x4_t words = vmovn_s32((int32x4_t)v);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  std::memcpy(p, &bytes, 4);
#endif
}

inline void store_bytes(int8_t* p, const I (&v)[4]) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  __m256i byte[4];
  for (int n = 0; n < 4; ++n) byte[n] = _mm256_and_si256((__m256i)v[n], _mm256_set1_epi32(0xff));
  const __m256i low = _mm256_packus_epi32(byte[0], byte[1]), high = _mm256_packus_epi32(byte[2], byte[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing keeps to the halves of a vector
  store(p, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
#else
  for (int n = 0; n < 4; ++n) store_bytes(p + n * LANES, v[n]);
#endif
}

// The sum of the lanes, halves first: always in the same order.
inline float sum(F v) {
  float a[LANES];
  store(a, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}

// The least of the lanes.
inline float least(F v) {
  float found = v[0];
  for (int i = 1; i < LANES; ++i) found = v[i] < found ? v[i] : found;
  return found;
}

}  // namespace AQ_ISA
}  // namespace aq
