// Matrices become trellis codes, for programs without XLA.
#include "ffi.h"
#include "own_threads.h"

namespace aq {
namespace {

const char* encode(const Matrix& in, int64_t threads, int& flags) {
  const Kernels* const chosen = choice;
  if (!chosen) return "no kernels for this processor";
  if (in.values < 1 || in.values > 2 || in.bits < 2 || in.bits > 5 || (in.values == 2 && in.bits != 3))
    return "wanted 2 to 5 bits a value, or 3 for two";
  if (in.rows <= 0 || in.columns <= 0 || in.tile_rows <= 0 || in.tile_rows * in.bits % (8 * in.values))
    return "wanted tiles of whole bytes";
  const int64_t tiles = ceil_div(in.rows, in.tile_rows), last = in.rows - (tiles - 1) * in.tile_rows;
  if (last % in.values || last / in.values * in.columns * in.bits < 12) return "wanted a state or more in every tile";
  OwnThreads pool(threads);
  std::atomic<int> found{0};
  parallel(pool, tiles, [&](int64_t i) { found |= chosen->trellis(in, i, i + 1); });
  flags = found;
  return nullptr;
}

}  // namespace
}  // namespace aq

// Return what is wrong, or null.
AQ_EXPORT const char* aq_encode_trellis(const float* w, int64_t rows, int64_t columns, int64_t tile_rows, int64_t bits,
                                        int64_t values, const int8_t* levels, const float* h, const float* u,
                                        double start, int64_t rounds, int64_t threads, uint8_t* data,
                                        float* scale, double* sums, int32_t* flags) {
  int found = 0;
  const char* wrong = aq::encode({w, rows, columns, tile_rows, int(bits), int(values), levels, h, u, float(start),
                                  rounds, data, scale, sums},
                                 threads, found);
  *flags = found;
  return wrong;
}
