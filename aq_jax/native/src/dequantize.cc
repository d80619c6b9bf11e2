// Codes of a bit stream become values.
#include "set.h"

#include <algorithm>

#include "flush.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {
namespace {

constexpr int RUN = 16;                // codes at a time: with 7 bits, and 7 bits before them, they lie in 16 bytes
constexpr int VECTORS = RUN / LANES;

// Where the codes of a run lie that begins at one bit of a byte: each lane takes two bytes, and shifts them.
struct Window {
  U bytes[VECTORS];
  I shift[VECTORS];
};

// The windows of the eight bits of a byte; 16 bytes lie in every 128 bits of a vector.
void make_windows(int bits, Window (&windows)[8]) {
  for (int first = 0; first < 8; ++first) {
    uint8_t bytes[4 * RUN];
    int32_t shift[RUN];
    for (int i = 0; i < RUN; ++i) {
      const int bit = first + bits * i;
      shift[i] = bit % 8;
      for (int k = 0; k < 4; ++k) bytes[4 * i + k] = k < 2 ? bit / 8 + k : 0x80;  // which gives zero
    }
    std::memcpy(windows[first].bytes, bytes, sizeof bytes);
    std::memcpy(windows[first].shift, shift, sizeof shift);
  }
}

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

inline I widen(const uint8_t* p) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return I{int8_t(p[0]), int8_t(p[1]), int8_t(p[2]), int8_t(p[3])};
#endif
}

// The values of a run of codes, which begin at a bit of a byte.
template <bool WHOLE>
inline F value(const uint8_t* from, const Window& window, int v, I mask, I half, F scale, F zero) {
  const I code = WHOLE ? widen(from + v * LANES) : (take(from, window.bytes[v], window.shift[v]) & mask) - half;
  return (to_float(code) - zero) * scale;
}

template <bool WHOLE>
void decode(const Codes& in, int64_t first, int64_t last, float* out) {
  const uint8_t* const stream = in.stream;
  const int64_t bytes = in.bytes, bits = in.bits, size = in.group;
  const I half = I{} + (1 << (bits - 1)), mask = I{} + ((1 << bits) - 1);
  Window windows[8] = {};
  if (!WHOLE) make_windows(in.bits, windows);
  for (int64_t at = first; at < last;) {
    const int64_t g = at / size, end = std::min(last, (g + 1) * size);
    const F scale = splat(in.scale[g]), zero = splat(in.zero ? in.zero[g] : 0);
    const Window window = windows[WHOLE ? 0 : at * bits % 8];  // runs are whole bytes: a group needs only one
    const uint8_t* from = stream + at * bits / 8;
    float* to = out + (at - first);
    int64_t left = end - at;
    for (; left >= RUN && from + RUN <= stream + bytes; left -= RUN, from += 2 * bits, to += RUN)
      for (int v = 0; v < VECTORS; ++v)
        store(to + v * LANES, value<WHOLE>(from, window, v, mask, half, scale, zero));
    for (; left > 0; left -= RUN, from += 2 * bits, to += RUN) {
      uint8_t part[RUN] = {};  // what lies behind the end counts as zero
      std::memcpy(part, from, std::min<int64_t>(RUN, stream + bytes - from));
      for (int v = 0; v < VECTORS && left > v * LANES; ++v)
        store_part(to + v * LANES, value<WHOLE>(part, window, v, mask, half, scale, zero), left - v * LANES);
    }
    at = end;
  }
}

}  // namespace

// (code - zero) * scale, in two roundings.
void dequantize(const Codes& in, int64_t first, int64_t last, float* out) {
  const Flush flush;
  if (in.bits == 8) return decode<true>(in, first, last, out);
  decode<false>(in, first, last, out);
}

}  // namespace AQ_ISA
}  // namespace aq
