// Trellis codes become values.
#include <algorithm>

#include "set.h"
#include "simd.h"
#include "trellis.h"

namespace aq {
namespace AQ_ISA {

// Level times scale, rounded once. States follow each other down the columns: so blocks of them are turned.
void decode_tiles(const Tiles& in, const float* scale, int64_t first, int64_t last, float* out) {
  constexpr int VECTORS = PANEL / LANES;
  const Levels levels(in);
  for (int64_t i = first; i < last; ++i) {
    const int64_t matrix = i / in.panels(), panel = i % in.panels(), from = matrix * in.rows + panel * PANEL;
    const Tile tile = tile_of(in, in.stream + matrix * in.matrix_bytes(), panel * PANEL);
    const int64_t count = std::min<int64_t>(PANEL, tile.rows - tile.row);
    F scales[VECTORS] = {};
    for (int v = 0; v < VECTORS && v * LANES < count; ++v)
      scales[v] = load_part(scale + from + v * LANES, count - v * LANES);
    for (int64_t column = 0; column < in.columns; column += LANES) {
      F block[VECTORS][LANES];
      const int64_t left = in.columns - column;
      for (int j = 0; j < LANES; ++j) {
        W its[VECTORS];
        levels.of_column(tile, std::min(column + j, in.columns - 1), its);
        for (int v = 0; v < VECTORS; ++v) block[v][j] = to_float((I)its[v] - LEVEL_OFFSET) * scales[v];
      }
      for (int v = 0; v < VECTORS; ++v) {
        turn(block[v]);
        float* to = out + (from + v * LANES) * in.columns + column;
        for (int64_t r = 0; r < std::min<int64_t>(LANES, count - v * LANES); ++r, to += in.columns)
          store_part(to, block[v][r], left);
      }
    }
  }
}

}  // namespace AQ_ISA
}  // namespace aq
