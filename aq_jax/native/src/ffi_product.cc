// Products, and the rounding of their inputs.
#include "ffi.h"

namespace aq {
namespace {

constexpr int64_t BLOCK = 64;  // rows whose inputs and outputs stay in a core's second cache

ffi::Error quantize_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Result<ffi::Buffer<ffi::S8>> codes,
                         ffi::Result<ffi::Buffer<ffi::F32>> scale, ffi::Result<ffi::Buffer<ffi::F32>> offset,
                         int64_t block) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("quantize_rows", "no kernels for this processor");
  if (x.dimensions().size() != 2) return invalid("quantize_rows", "wanted x [rows, inputs]");
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  if (!has_shape(*codes, {rows, inputs}) || !has_shape(*scale, {rows}) || !has_shape(*offset, {rows}))
    return invalid("quantize_rows", "wanted codes [rows, inputs], scale [rows], offset [rows]");
  if (block && (block < 2 || block & (block - 1) || inputs % block))
    return invalid("quantize_rows", "wanted a power of two that divides the inputs as the block of the rotation");
  if (!rows) return ffi::Error::Success();
  const Parts parts(rows, threads_for(pool, 32 * rows * inputs));
  parallel(pool, parts.parts, [&](int64_t i) {
    const int64_t first = parts.first(i);
    chosen->quantize_rows(x.typed_data() + first * inputs, parts.first(i + 1) - first, inputs, block,
                          codes->typed_data() + first * inputs, scale->typed_data() + first,
                          offset->typed_data() + first);
  });
  return ffi::Error::Success();
}

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> codes, ffi::Buffer<ffi::F32> scale,
                   ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::U8> panels, ffi::Buffer<ffi::F32> grids,
                   ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> residual, ffi::Buffer<ffi::F32> gain,
                   ffi::Buffer<ffi::F32> shift, ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t act, float eps) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("product", "no kernels for this processor");
  if (codes.dimensions().size() != 2 || y->dimensions().size() != 2 || grids.dimensions().size() != 4)
    return invalid("product", "wanted codes [rows, inputs], grids [panels, groups, 3, 16], y [rows, outputs]");
  const Weight w = {panels.typed_data(), grids.typed_data(), y->dimensions()[1], codes.dimensions()[1],
                    grids.dimensions()[1]};
  const int64_t rows = codes.dimensions()[0], count = w.panels();
  if (!w.groups || w.inputs % w.groups || !w.inputs) return invalid("product", "wanted whole groups of inputs");
  if (!has_shape(scale, {rows}) || !has_shape(offset, {rows}) || !has_shape(*y, {rows, w.outputs}))
    return invalid("product", "wanted scale [rows], offset [rows], y [rows, outputs]");
  if (!has_shape(panels, {count, w.groups * w.steps(), PANEL, 4}) || !has_shape(grids, {count, w.groups, 3, PANEL}))
    return invalid("product", "wanted the weight's codes [panels, steps, 16, 4], grids [panels, groups, 3, 16]");
  const bool norm = gain.element_count(), plain = !residual.element_count();
  if ((bias.element_count() && !has_shape(bias, {w.outputs})) || (!plain && !has_shape(residual, {rows, w.outputs})) ||
      (norm && !has_shape(gain, {w.outputs})) || !has_shape(shift, {norm ? w.outputs : 0}))
    return invalid("product", "wanted bias, gain and shift [outputs], residual [rows, outputs]; or none of each");
  if (act < 0 || act > int64_t(Act::relu)) return invalid("product", "unknown activation");
  if (!rows || !w.outputs) return ffi::Error::Success();
  const Inputs in = {codes.typed_data(), scale.typed_data(), offset.typed_data()};
  const After after = {bias.element_count() ? bias.typed_data() : nullptr, Act(act),
                       plain ? nullptr : residual.typed_data(), norm ? gain.typed_data() : nullptr,
                       norm ? shift.typed_data() : nullptr, eps};
  // Blocks of rows for each thread; few rows are computed by panels, of which each thread takes some.
  const int64_t threads = threads_for(pool, rows * w.inputs * w.outputs);
  const bool by_rows = rows >= 16 * threads;
  const Parts blocks(rows, std::max(ceil_div(rows, BLOCK), by_rows ? threads : 1));
  const Parts chunks(count, by_rows ? 1 : std::min(threads, ceil_div(count, 2)));
  parallel(pool, blocks.parts * chunks.parts, [&](int64_t item) {
    const int64_t i = item / chunks.parts, j = item % chunks.parts;
    const int64_t first = blocks.first(i), end = blocks.first(i + 1);
    chosen->product(in, w, after, first, end, chunks.first(j), chunks.first(j + 1), y->typed_data());
    if (norm && chunks.parts == 1) chosen->normalize(after, first, end, w.outputs, y->typed_data());
  });
  if (norm && chunks.parts > 1) chosen->normalize(after, 0, rows, w.outputs, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace aq

AQ_EXPORT XLA_FFI_Error* aq_quantize_rows(XLA_FFI_CallFrame*);
AQ_EXPORT XLA_FFI_Error* aq_product(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_quantize_rows, aq::quantize_rows,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::S8>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<int64_t>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_product, aq::product,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::S8>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::U8>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<int64_t>("act")
                                  .Attr<float>("eps"));
