// Rows of a table, from the panels that products read.
#include "codes.h"
#include "grids_of.h"
#include "set.h"

#include <algorithm>
#include <limits>

#include "trellis.h"

namespace aq {
namespace AQ_ISA {
namespace {

template <int BITS>
void row_of_table(const Weight& w, int64_t row, float* y) {
  using P = Planes<BITS>;
  const int64_t panel = row / PANEL, lane = row % PANEL;
  const uint8_t* chunk = w.codes + panel * w.bytes() + 4 * lane;
  const bool adds = w.adds();
  const int half = P::HALF - (adds ? int(w.lift) : 0);
  GridsOf<1> grids(w, panel);
  for (int64_t g = 0; g < w.groups; ++g, y += w.size()) {
    grids.next(g);
    const GridAt grid = grids.at(0, g);
    const float scale = grid.scale[lane], offset = grid.offset[lane], zero = adds ? 0 : offset;
    for (int64_t at = 0; at < w.size(); at += 4 * P::STEPS, chunk += P::LINES * LINE) {
      float values[4 * P::STEPS];
      unroll<P::STEPS>([&](auto s) {
        const uint32_t codes = step_of<BITS, s, uint32_t>(chunk);
        for (int j = 0; j < 4; ++j) {
          const float value = (float(int(codes >> 8 * j & 255) - half) - zero) * scale;
          values[4 * s + j] = adds ? value + offset : value;
        }
      });
      std::copy_n(values, std::min<int64_t>(4 * P::STEPS, w.size() - at), y + at);
    }
  }
}

void rows_of_tiles(const Weight& w, const int32_t* ids, int64_t count, float* y) {
  const Tiles tiles = w.tiles();
  const Levels levels(tiles);
  for (int64_t i = 0; i < count; ++i, y += w.inputs) {
    const bool known = ids[i] >= 0 && ids[i] < w.outputs;
    const int64_t row = known ? ids[i] : 0;
    const Tile tile = tile_of(tiles, w.codes, row);
    const float* scales = w.grid<float>(row / PANEL, 0, 0);
    const F scale = splat(known ? scales[row % PANEL] : std::numeric_limits<float>::quiet_NaN());
    for (int64_t at = 0; at < w.inputs; at += LANES) {
      const I its = (I)levels.of_row(tile, at) - LEVEL_OFFSET;
      store_part(y + at, to_float(its) * scale, w.inputs - at);
    }
  }
}

}  // namespace

void rows(const Weight& w, const int32_t* ids, int64_t count, float* y) {
  if (w.step_bits) return rows_of_tiles(w, ids, count, y);
  with_bits(w.bits, [&](auto bits) {
    for (int64_t i = 0; i < count; ++i, y += w.inputs)
      if (ids[i] < 0 || ids[i] >= w.outputs)
        std::fill_n(y, w.inputs, std::numeric_limits<float>::quiet_NaN());
      else
        row_of_table<bits>(w, ids[i], y);
  });
}

}  // namespace AQ_ISA
}  // namespace aq
