// Levels of trellis codes: of the rows of a panel in one column, and of single weights.
#pragma once

#include "kernels.h"
#include "windows.h"

namespace aq {
namespace AQ_ISA {

constexpr int STATE_BITS = 12, STATE_MASK = (1 << STATE_BITS) - 1;
constexpr int LEVEL_OFFSET = 128;  // what is added to levels, which makes them unsigned
constexpr uint32_t FACTOR[2] = {0xBD8E8CD7, 0x6F531C4F}, SUMMAND[2] = {0xED71BC08, 0x65330338};

// The tile of a row of a matrix: its stream, which is a ring of bits.
struct Tile {
  const uint8_t* stream;
  const uint8_t* end;       // of the matrix: nothing behind it is read
  int64_t row, rows, bits;  // the row's number in the tile
  int64_t first, column;    // the bit of its state in the first column, and the bits from one column to the next
};

inline Tile tile_of(const Tiles& in, const uint8_t* matrix, int64_t row) {
  const int64_t number = row / Tiles::ROWS, from = row % Tiles::ROWS, left = in.rows - number * Tiles::ROWS;
  const int64_t rows = left < Tiles::ROWS ? left : Tiles::ROWS;
  return {matrix + number * in.bytes(Tiles::ROWS), matrix + in.matrix_bytes(), from, rows, in.bits(rows),
          from / in.step_rows * in.step_bits,      rows / in.step_rows * in.step_bits};
}

// So many bits of a ring, from one on.
inline void copy_ring(const Tile& tile, int64_t bit, int64_t count, uint8_t* to) {
  int64_t at = bit % tile.bits;
  std::memset(to, 0, (count + 7) / 8);
  for (int64_t i = 0; i < count; ++i) {
    to[i / 8] |= (tile.stream[at / 8] >> at % 8 & 1) << i % 8;
    if (++at == tile.bits) at = 0;
  }
}

inline W byte_sums(W x) {
#if defined(__AVX512VNNI__)
  return (W)_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)x, _mm512_set1_epi8(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, _mm256_set1_epi8(1));
  return (W)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  return (W)vdotq_u32(vdupq_n_u32(0), (uint8x16_t)x, vdupq_n_u8(1));
#endif
}

// Reads levels, + LEVEL_OFFSET.
class Levels {
 public:
  explicit Levels(const Tiles& in) : high_(in.step_rows), span_((RUN - 1) / in.step_rows * in.step_bits + STATE_BITS) {
    make_windows(int(in.step_bits), int(in.step_rows), 3, windows_);
    for (int i = 0; i < LANES; ++i) {
      factor_[i] = FACTOR[i % in.step_rows];
      summand_[i] = SUMMAND[i % in.step_rows];
    }
  }

  // Of PANEL rows from that of the tile on, a multiple of PANEL. Lanes behind the last row of a tile have some level.
  void of_column(const Tile& tile, int64_t column, W (&levels)[RUN / LANES]) const {
    const int64_t bit = tile.first + column * tile.column;
    const uint8_t* from = tile.stream + bit / 8;
    if (__builtin_expect(bit + span_ <= tile.bits && from + 16 <= tile.end, 1))
      return lanes(from, windows_[bit % 8], levels);
    uint8_t part[16] = {};
    copy_ring(tile, bit, span_, part);
    lanes(part, windows_[0], levels);
  }

  // Of the tile's row, in LANES columns; lanes behind the last column have some level.
  W of_row(const Tile& tile, int64_t column) const {
    W states;
    int64_t bit = tile.first + column * tile.column;
    for (int i = 0; i < LANES; ++i, bit += tile.column) {
      const uint8_t* from = tile.stream + bit / 8;
      uint32_t bytes = 0;
      if (bit + STATE_BITS <= tile.bits && from + 4 <= tile.end) {
        std::memcpy(&bytes, from, 4);
        states[i] = bytes >> bit % 8;
      } else {
        uint8_t part[4] = {};
        copy_ring(tile, bit, STATE_BITS, part);
        std::memcpy(&bytes, part, 4);
        states[i] = bytes;
      }
    }
    const int64_t which = tile.row % high_;
    return level(states, W{} + FACTOR[which], W{} + SUMMAND[which]);
  }

 private:
  static W level(W states, W factor, W summand) {
    return (byte_sums((states & STATE_MASK) * factor + summand) >> 2) + (LEVEL_OFFSET - 127);
  }

  void lanes(const uint8_t* from, const Window& window, W (&levels)[RUN / LANES]) const {
    for (int v = 0; v < RUN / LANES; ++v)
      levels[v] = level((W)take(from, window.bytes[v], window.shift[v]), factor_, summand_);
  }

  const int64_t high_;  // rows of a step
  const int64_t span_;  // the bits of the states of a panel's column
  W factor_, summand_;
  Window windows_[8];
};

}  // namespace AQ_ISA
}  // namespace aq
