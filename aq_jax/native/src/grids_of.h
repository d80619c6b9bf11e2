// The grids of a panel's groups, as floats: scales, and zero points or minimums.
//
// Panels hold the scales of all groups, and then the others, as the table does, 16 outputs side by side: floats, which
// are read where they are; halves; or records (codes/records.py), whose bytes are a half, then the integers of 8 or 16
// groups in a stream of bits. Zero points that the groups of an output share are not read: as floats, they are a sixth
// of int4 in groups of 32.
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

struct GridAt {
  const float *scale, *offset;  // [16]
};

// The grids of groups, a few at a time, of up to PANELS panels.
template <int PANELS>
class GridsOf {
 public:
  GridsOf(const Weight& w, int64_t panel, int64_t panels = PANELS) : w_(w), panel_(panel), panels_(panels) {
    for (int64_t p = 0; p < panels; ++p) {
      shares_[p] = w.shares_zeros(panel + p);
      from_[p][0] = spare_[p][0], from_[p][1] = shares_[p] ? w.shared_zeros(panel + p) : spare_[p][1];
    }
  }

  // Get ready for a group, the next one each time.
  void next(int64_t group) {
    if (group % SOME) return;
    const int64_t count = std::min(SOME, w_.groups - group);
    for (int64_t p = 0; p < panels_; ++p)
      for (int part = 0; part < (shares_[p] ? 1 : 2); ++part) {
        prefetch(panel_ + p + PANELS, part, group);
        switch (w_.form) {
          case Form::floats: from_[p][part] = w_.grid<float>(panel_ + p, part, group); break;
          case Form::records: read_records(panel_ + p, part, group, count, spare_[p][part]); break;
          default: read_words(panel_ + p, part, group, count, spare_[p][part]);
        }
      }
  }

  GridAt at(int64_t p, int64_t group) const {
    const int64_t there = group % SOME * PANEL;
    return {from_[p][0] + there, from_[p][1] + (shares_[p] ? 0 : there)};
  }

 private:
  static constexpr int64_t SOME = 16;  // groups: whole records

  // Grids of the next panels: processors do not expect them, since those of a panel are too few.
  void prefetch(int64_t panel, int part, int64_t group) const {
    if (panel >= w_.panels()) return;
    const bool records = w_.form == Form::records;
    const int64_t first = records ? group / w_.record_groups() * w_.record_bytes() : group;
    const int64_t most = records ? SOME / w_.record_groups() * w_.record_bytes() : SOME;
    const char* const from = w_.grid<char>(panel, part, first);
    const int64_t end = std::min(most, w_.elements() - first) * PANEL * w_.element_bytes();
    for (int64_t at = 0; at < end; at += 64) __builtin_prefetch(from + at);
  }

  void read_words(int64_t panel, int part, int64_t group, int64_t count, float* to) const {
    const uint16_t* from = w_.grid<uint16_t>(panel, part, group);
    const F base = splat(part ? float(w_.zero_base) : 0);
    for (int64_t i = 0; i < count * PANEL; i += LANES) store(to + i, from_words(from + i, w_.form) - base);
  }

  void read_records(int64_t panel, int part, int64_t group, int64_t count, float* to) const {
    const int64_t groups = w_.record_groups(), bytes = w_.record_bytes();
    const uint8_t* from = w_.grid<uint8_t>(panel, part, group / groups * bytes);
    for (int64_t first = 0; first < count; first += groups, from += bytes * PANEL, to += groups * PANEL)
      for (int i = 0; i < PANEL; i += LANES) read_record(from + i, part, groups, to + i);
  }

  void read_record(const uint8_t* from, int part, int64_t groups, float* to) const {
    F half = from_halves(widen_bytes(from) | widen_bytes(from + PANEL) << 8);
    if (part) half = -half;  // of minimums
    const uint8_t* integers = from + 2 * PANEL;
    const uint32_t mask = (1u << w_.sub_bits) - 1;
    // Those of records without minimums are signed; eight bits are a signed byte.
    const int32_t added = w_.adds() ? 0 : 1 << (w_.sub_bits - 1);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t bit = g * w_.sub_bits, shift = bit % 8;
      const uint8_t* byte = integers + bit / 8 * PANEL;
      W word = widen_bytes(byte);
      if (shift + w_.sub_bits > 8) word |= widen_bytes(byte + PANEL) << 8;
      I integer = (I)((word >> uint32_t(shift)) & mask);
      integer = w_.sub_bits == 8 ? integer << 24 >> 24 : integer - added;
      store(to + g * PANEL, half * to_float(integer));
    }
  }

  const Weight& w_;
  const int64_t panel_, panels_;
  bool shares_[PANELS];
  const float* from_[PANELS][2];
  alignas(64) float spare_[PANELS][2][SOME * PANEL];
};

}  // namespace AQ_ISA
}  // namespace aq
