// Values of trellis codes: for XLA, and for programs without it.
#include "ffi.h"
#include "own_threads.h"
#include "pages.h"

namespace aq {
namespace {

// Decode matrices; return what is wrong, or null.
template <class Pool>
const char* decode(Pool& pool, const Tiles& tiles, int64_t bytes, const float* scale, int64_t matrices, float* out) {
  const Kernels* const chosen = choice;
  if (!chosen) return "no kernels for this processor";
  if (!tiles.sound()) return "wanted steps of 2 to 5 bits, or of 3 for two rows, and tiles of whole steps and 12 bits";
  if (matrices < 0 || bytes != matrices * tiles.matrix_bytes()) return "wanted the bytes of the matrices";
  const int64_t count = matrices * tiles.rows * tiles.columns, panels = matrices * tiles.panels();
  want_large_pages(out, 4 * count);
  const int64_t threads = count < 1 << 18 ? 1 : pool.num_threads();
  const Parts parts(panels, threads == 1 ? 1 : 4 * threads);
  parallel(pool, parts.parts,
           [&](int64_t i) { chosen->decode_tiles(tiles, scale, parts.first(i), parts.first(i + 1), out); });
  return nullptr;
}

ffi::Error dequantize_tiles(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::F32> scale,
                            ffi::Result<ffi::Buffer<ffi::F32>> out, int64_t step_bits, int64_t step_rows) {
  const auto shape = out->dimensions();
  if (shape.size() < 2) return invalid("dequantize_tiles", "wanted values [..., rows, columns]");
  const int64_t rows = shape[shape.size() - 2], columns = shape[shape.size() - 1];
  const int64_t matrices = rows && columns ? int64_t(out->element_count()) / rows / columns : 0;
  if (int64_t(scale.element_count()) != matrices * rows)
    return invalid("dequantize_tiles", "wanted a scale for each row");
  const Tiles tiles = {codes.typed_data(), rows, columns, step_bits, step_rows};
  const char* wrong = decode(pool, tiles, codes.element_count(), scale.typed_data(), matrices, out->typed_data());
  return wrong ? invalid("dequantize_tiles", wrong) : ffi::Error::Success();
}

}  // namespace
}  // namespace aq

// Return what is wrong, or null.
AQ_EXPORT const char* aq_decode_tiles(const uint8_t* stream, int64_t bytes, int64_t step_bits, int64_t step_rows,
                                      const float* scale, int64_t matrices, int64_t rows, int64_t columns,
                                      int64_t threads, float* out) {
  aq::OwnThreads pool(threads);
  return aq::decode(pool, {stream, rows, columns, step_bits, step_rows}, bytes, scale, matrices, out);
}

AQ_EXPORT XLA_FFI_Error* aq_dequantize_tiles(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_dequantize_tiles, aq::dequantize_tiles,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::U8>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<int64_t>("step_bits")
                                  .Attr<int64_t>("step_rows"));
