// The grids of a panel's groups, as floats: [groups][2][16], scales and zero points, or minimums.
//
// Panels hold them as the table does, 16 outputs side by side: floats, which are read where they are; halves; or records
// (codes/records.py), whose bytes are a half, then the integers of 8 or 16 groups in a stream of bits.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace aq {
namespace AQ_ISA {

// Halves in the low bits of lanes. Subnormal ones are numbers, though subnormal floats count as zero.
inline F from_halves(W half) {
  const W magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
  const F normal = (F)((magnitude << 13) + (112u << 23)), small = to_float((I)magnitude) * splat(0x1p-24f);
  return (F)((magnitude < 0x400 ? (W)small : (W)normal) | sign);
}

inline W widen_bytes(const uint8_t* p) {
#if defined(__AVX512VNNI__)
  return (W)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (W)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return W{p[0], p[1], p[2], p[3]};
#endif
}

inline W widen_words(const uint16_t* p) {
#if defined(__AVX512VNNI__)
  return (W)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (W)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return W{p[0], p[1], p[2], p[3]};
#endif
}

inline F from_words(const uint16_t* p, Form form) {
  if (form == Form::brain_floats) return (F)(widen_words(p) << 16);
#if defined(__AVX512VNNI__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  return from_halves(widen_words(p));
#endif
}

// The grids of groups, a few at a time, of up to PANELS panels.
template <int PANELS>
class GridsOf {
 public:
  GridsOf(const Weight& w, int64_t panel, int64_t panels = PANELS) : w_(w), panel_(panel), panels_(panels) {}

  // Get ready for a group, the next one each time.
  void next(int64_t group) {
    if (group % SOME) return;
    for (int64_t p = 0; p < panels_; ++p) {
      prefetch(panel_ + p + PANELS, group);
      from_[p] = w_.form == Form::floats ? w_.grid(panel_ + p, group) : spare_[p];
      if (w_.form == Form::floats) continue;
      const int64_t count = w_.groups - group < SOME ? w_.groups - group : SOME;
      w_.form == Form::records ? read_records(panel_ + p, group, count, spare_[p])
                               : read_words(panel_ + p, group, count, spare_[p]);
    }
  }

  const float* at(int64_t p, int64_t group) const { return from_[p] + group % SOME * 2 * PANEL; }

 private:
  static constexpr int64_t SOME = 16;  // groups: whole records

  // Grids of the next panels: processors do not expect them, since those of a panel are too few.
  void prefetch(int64_t panel, int64_t group) const {
    const bool records = w_.form == Form::records;
    const int64_t bytes = w_.parts * PANEL * (records ? 1 : w_.form == Form::floats ? 4 : 2);
    const int64_t first = records ? group / w_.record_groups() * w_.record_bytes() : group;
    const int64_t count = records ? SOME / w_.record_groups() * w_.record_bytes() : SOME;
    const char* const from = static_cast<const char*>(w_.grids) + (panel * w_.elements() + first) * bytes;
    const int64_t end = std::min(count, w_.elements() - first) * bytes;
    for (int64_t at = 0; at < end && panel < w_.panels(); at += 64) __builtin_prefetch(from + at);
  }

  void read_words(int64_t panel, int64_t group, int64_t count, float* to) const {
    const uint16_t* from = static_cast<const uint16_t*>(w_.grids) + (panel * w_.groups + group) * w_.parts * PANEL;
    const F base[2] = {splat(0), splat(float(w_.zero_base))};
    for (int64_t g = 0; g < count; ++g, to += 2 * PANEL, from += w_.parts * PANEL)
      for (int64_t i = 0; i < 2 * PANEL; i += LANES)
        store(to + i, i < w_.parts * PANEL ? from_words(from + i, w_.form) - base[i / PANEL] : F{});
  }

  void read_records(int64_t panel, int64_t group, int64_t count, float* to) const {
    const int64_t groups = w_.record_groups(), bytes = w_.record_bytes(), row = w_.parts * PANEL;
    const uint8_t* from = static_cast<const uint8_t*>(w_.grids) + (panel * w_.elements() + group / groups * bytes) * row;
    for (int64_t first = 0; first < count; first += groups, from += bytes * row, to += groups * 2 * PANEL)
      for (int64_t i = 0; i < 2 * PANEL; i += LANES)
        read_record(from + i, i < w_.parts * PANEL, i >= PANEL, row, groups, to + i);
  }

  void read_record(const uint8_t* from, bool there, bool minimums, int64_t row, int64_t groups, float* to) const {
    if (!there) {
      for (int64_t g = 0; g < groups; ++g) store(to + g * 2 * PANEL, F{});
      return;
    }
    F half = from_halves(widen_bytes(from) | widen_bytes(from + row) << 8);
    if (minimums) half = -half;
    const uint8_t* integers = from + 2 * row;
    const uint32_t mask = (1u << w_.sub_bits) - 1;
    // Those of records without minimums are signed; eight bits are a signed byte.
    const int32_t added = w_.adds() ? 0 : 1 << (w_.sub_bits - 1);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t bit = g * w_.sub_bits, shift = bit % 8;
      const uint8_t* byte = integers + bit / 8 * row;
      W word = widen_bytes(byte);
      if (shift + w_.sub_bits > 8) word |= widen_bytes(byte + row) << 8;
      I integer = (I)((word >> uint32_t(shift)) & mask);
      integer = w_.sub_bits == 8 ? integer << 24 >> 24 : integer - added;
      store(to + g * 2 * PANEL, half * to_float(integer));
    }
  }

  const Weight& w_;
  const int64_t panel_, panels_;
  const float* from_[PANELS];
  alignas(64) float spare_[PANELS][SOME * 2 * PANEL];
};

}  // namespace AQ_ISA
}  // namespace aq
