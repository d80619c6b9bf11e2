// Codes of a bit stream become values.
#include "set.h"

#include <algorithm>

#include "flush.h"
#include "simd.h"
#include "windows.h"

namespace aq {
namespace AQ_ISA {
namespace {

constexpr int VECTORS = RUN / LANES;

inline I widen(const uint8_t* p) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return I{int8_t(p[0]), int8_t(p[1]), int8_t(p[2]), int8_t(p[3])};
#endif
}

struct Grid {
  F scale, zero, minimum;
  bool lifted;
};

// The values of a run of codes, which begin at a bit of a byte.
template <bool WHOLE>
inline F value(const uint8_t* from, const Window& window, int v, I mask, I half, const Grid& grid) {
  const I code = WHOLE ? widen(from + v * LANES) : (take(from, window.bytes[v], window.shift[v]) & mask) - half;
  const F scaled = (to_float(code) - grid.zero) * grid.scale;
  return grid.lifted ? scaled + grid.minimum : scaled;
}

template <bool WHOLE>
void decode(const Codes& in, int64_t first, int64_t last, float* out) {
  const uint8_t* const stream = in.stream;
  const int64_t bytes = in.bytes, bits = in.bits, size = in.group;
  const I half = I{} + (1 << (bits - 1)), mask = I{} + ((1 << bits) - 1);
  Window windows[8] = {};
  if (!WHOLE) make_windows(in.bits, 1, 2, windows);
  for (int64_t at = first; at < last;) {
    const int64_t g = at / size, end = std::min(last, (g + 1) * size);
    const Grid grid = {splat(in.scale[g]), splat(in.zero ? in.zero[g] : 0), splat(in.minimum ? in.minimum[g] : 0),
                       in.minimum != nullptr};
    const Window window = windows[WHOLE ? 0 : at * bits % 8];  // runs are whole bytes: a group needs only one
    const uint8_t* from = stream + at * bits / 8;
    float* to = out + (at - first);
    int64_t left = end - at;
    for (; left >= RUN && from + RUN <= stream + bytes; left -= RUN, from += 2 * bits, to += RUN)
      for (int v = 0; v < VECTORS; ++v)
        store(to + v * LANES, value<WHOLE>(from, window, v, mask, half, grid));
    for (; left > 0; left -= RUN, from += 2 * bits, to += RUN) {
      uint8_t part[RUN] = {};  // what lies behind the end counts as zero
      std::memcpy(part, from, std::min<int64_t>(RUN, stream + bytes - from));
      for (int v = 0; v < VECTORS && left > v * LANES; ++v)
        store_part(to + v * LANES, value<WHOLE>(part, window, v, mask, half, grid), left - v * LANES);
    }
    at = end;
  }
}

}  // namespace

// (code - zero) * scale, in two roundings, and + minimum, in a third.
void dequantize(const Codes& in, int64_t first, int64_t last, float* out) {
  const Flush flush;
  if (in.bits == 8) return decode<true>(in, first, last, out);
  decode<false>(in, first, last, out);
}

}  // namespace AQ_ISA
}  // namespace aq
