// Products, what is done to their inputs before, and rows of tables.
#include "ffi.h"

#include <utility>

namespace aq {

// What the arrays of a weight do not tell (ops/native_panels.py).
struct Attributes {
  int64_t bits, step_bits, step_rows, groups, sub_bits, lift, zero_base;
};

}  // namespace aq

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(aq::Attributes, StructMember<int64_t>("bits"), StructMember<int64_t>("step_bits"),
                                      StructMember<int64_t>("step_rows"), StructMember<int64_t>("groups"),
                                      StructMember<int64_t>("sub_bits"), StructMember<int64_t>("lift"),
                                      StructMember<int64_t>("zero_base"));

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

ffi::Error rotate_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Result<ffi::Buffer<ffi::F32>> y,
                       int64_t block) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("rotate_rows", "no kernels for this processor");
  if (x.dimensions().size() != 2) return invalid("rotate_rows", "wanted x [rows, inputs]");
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  if (!has_shape(*y, {rows, inputs})) return invalid("rotate_rows", "wanted y [rows, inputs]");
  if (block < 2 || block & (block - 1) || inputs % block)
    return invalid("rotate_rows", "wanted a power of two that divides the inputs as the block of the rotation");
  if (!rows) return ffi::Error::Success();
  const Parts parts(rows, threads_for(pool, 32 * rows * inputs));
  parallel(pool, parts.parts, [&](int64_t i) {
    const int64_t first = parts.first(i);
    chosen->rotate_rows(x.typed_data() + first * inputs, parts.first(i + 1) - first, inputs, block,
                        y->typed_data() + first * inputs);
  });
  return ffi::Error::Success();
}

// A weight [outputs, inputs] of these arrays; its `codes` are null where shapes do not fit.
Weight weight_of(ffi::Buffer<ffi::U8> panels, ffi::AnyBuffer grids, ffi::Buffer<ffi::F32> constants, int64_t outputs,
                 int64_t inputs, const Attributes& a) {
  Weight w = {nullptr,     grids.untyped_data(), constants.typed_data(), outputs, inputs,     a.groups, a.bits,
              a.step_bits, a.step_rows,          Form::floats,           0,       a.sub_bits, a.lift, a.zero_base};
  const bool known = w.bits == 8 || (w.bits >= 2 && w.bits <= 6);
  if (!known || grids.dimensions().size() != 4 || inputs <= 0 || w.groups <= 0 || inputs % w.groups) return w;
  if (w.lift < -1 || w.lift > 1 << (w.bits - 1)) return w;
  w.parts = grids.dimensions()[1];
  switch (grids.element_type()) {
    case ffi::F32: w.form = Form::floats; break;
    case ffi::F16: w.form = Form::halves; break;
    case ffi::BF16: w.form = Form::brain_floats; break;
    case ffi::U8: w.form = Form::records; break;
    default: return w;
  }
  if (w.form == Form::records) {
    if (inputs % Weight::RECORD || (w.size() != 16 && w.size() != 32)) return w;
    if (w.sub_bits != 4 && w.sub_bits != 6 && w.sub_bits != 8) return w;
  }
  // Scales alone, unless there are minimums; or with zero points.
  if (w.parts != 2 && (w.parts != 1 || w.adds())) return w;
  const int64_t count = w.panels(), step_bits = w.step_bits;
  if (step_bits) {
    const Tiles tiles = w.tiles();
    if (w.bits != 8 || w.groups != 1 || w.form != Form::floats || !tiles.sound()) return w;
    if (!has_shape(panels, {tiles.matrix_bytes()})) return w;
  }
  if ((step_bits || has_shape(panels, {count, w.groups * w.lines(), PANEL, 4})) &&
      has_shape(grids, {count, w.parts, w.elements(), PANEL}) && has_shape(constants, {count, 2, PANEL}))
    w.codes = panels.typed_data();
  return w;
}

constexpr const char* WEIGHT =
    "wanted bits 2 to 6 or 8, whole groups of inputs, the weight's codes [panels, lines, 16, 4], grids [panels, 1 or "
    "2, elements, 16], constants [panels, 2, 16]; of trellis codes the bytes of their tiles";

ffi::Error multiply(ffi::ThreadPool& pool, const Inputs& in, int64_t rows, const Weight& w,
                    ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> factor, ffi::Buffer<ffi::F32> residual,
                    ffi::Buffer<ffi::F32> gain, ffi::Buffer<ffi::F32> shift, ffi::Result<ffi::Buffer<ffi::F32>> y,
                    int64_t act, float eps) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("product", "no kernels for this processor");
  if (!w.codes) return invalid("product", WEIGHT);
  if (!has_shape(*y, {rows, w.outputs})) return invalid("product", "wanted y [rows, outputs]");
  const bool norm = gain.element_count();
  if ((bias.element_count() && !has_shape(bias, {w.outputs})) ||
      (factor.element_count() && !has_shape(factor, {rows, w.outputs})) ||
      (residual.element_count() && !has_shape(residual, {rows, w.outputs})) ||
      (norm && !has_shape(gain, {w.outputs})) || !has_shape(shift, {norm ? w.outputs : 0}))
    return invalid("product",
                   "wanted bias, gain and shift [outputs], factor and residual [rows, outputs]; or none of each");
  if (act < 0 || act > int64_t(Act::silu)) return invalid("product", "unknown activation");
  if (!rows || !w.outputs) return ffi::Error::Success();
  const After after = {bias.element_count() ? bias.typed_data() : nullptr, Act(act),
                       factor.element_count() ? factor.typed_data() : nullptr,
                       residual.element_count() ? residual.typed_data() : nullptr, norm ? gain.typed_data() : nullptr,
                       norm ? shift.typed_data() : nullptr, eps};
  // Blocks of rows for each thread; few rows are computed by panels, of which each thread takes some.
  const int64_t count = w.panels(), threads = threads_for(pool, rows * w.inputs * w.outputs * (in.floats ? 4 : 1));
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

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> panels,
                   ffi::AnyBuffer grids, ffi::Buffer<ffi::F32> constants, ffi::Buffer<ffi::F32> bias,
                   ffi::Buffer<ffi::F32> factor, ffi::Buffer<ffi::F32> residual, ffi::Buffer<ffi::F32> gain,
                   ffi::Buffer<ffi::F32> shift, ffi::Result<ffi::Buffer<ffi::F32>> y,
                   const Attributes& weight, int64_t act, float eps) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2)
    return invalid("product", "wanted x [rows, inputs], y [rows, outputs]");
  const Weight w = weight_of(panels, grids, constants, y->dimensions()[1], x.dimensions()[1], weight);
  const Inputs in = {x.typed_data(), nullptr, nullptr, nullptr};
  return multiply(pool, in, x.dimensions()[0], w, bias, factor, residual, gain, shift, y, act, eps);
}

ffi::Error product_of_codes(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> codes, ffi::Buffer<ffi::F32> scale,
                            ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::U8> panels, ffi::AnyBuffer grids,
                            ffi::Buffer<ffi::F32> constants, ffi::Buffer<ffi::F32> bias,
                            ffi::Buffer<ffi::F32> factor, ffi::Buffer<ffi::F32> residual, ffi::Buffer<ffi::F32> gain,
                            ffi::Buffer<ffi::F32> shift, ffi::Result<ffi::Buffer<ffi::F32>> y,
                            const Attributes& weight, int64_t act, float eps) {
  if (codes.dimensions().size() != 2 || y->dimensions().size() != 2)
    return invalid("product", "wanted codes [rows, inputs], y [rows, outputs]");
  const int64_t rows = codes.dimensions()[0];
  if (!has_shape(scale, {rows}) || !has_shape(offset, {rows}))
    return invalid("product", "wanted scale [rows], offset [rows]");
  const Weight w = weight_of(panels, grids, constants, y->dimensions()[1], codes.dimensions()[1], weight);
  const Inputs in = {nullptr, codes.typed_data(), scale.typed_data(), offset.typed_data()};
  return multiply(pool, in, rows, w, bias, factor, residual, gain, shift, y, act, eps);
}

ffi::Error rows(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::U8> panels,
                ffi::AnyBuffer grids, ffi::Buffer<ffi::F32> constants, ffi::Result<ffi::Buffer<ffi::F32>> y,
                const Attributes& weight, int64_t outputs) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("rows", "no kernels for this processor");
  if (ids.dimensions().size() != 1 || y->dimensions().size() != 2 || y->dimensions()[0] != ids.dimensions()[0])
    return invalid("rows", "wanted ids [count], y [count, width]");
  const int64_t count = ids.dimensions()[0], width = y->dimensions()[1];
  const Weight w = weight_of(panels, grids, constants, outputs, width, weight);
  if (!w.codes) return invalid("rows", WEIGHT);
  if (!count) return ffi::Error::Success();
  const Parts parts(count, threads_for(pool, 32 * count * width));
  parallel(pool, parts.parts, [&](int64_t i) {
    const int64_t first = parts.first(i);
    chosen->rows(w, ids.typed_data() + first, parts.first(i + 1) - first, y->typed_data() + first * width);
  });
  return ffi::Error::Success();
}

// What both kinds of products have after their inputs: the weight, what follows, the result, numbers.
template <class Binding>
auto with_weight(Binding&& inputs) {
  typedef ffi::Buffer<ffi::F32> Floats;
  return std::move(inputs)
      .template Arg<ffi::Buffer<ffi::U8>>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Ret<Floats>()
      .template Attr<Attributes>("weight")
      .template Attr<int64_t>("act")
      .template Attr<float>("eps");
}

}  // namespace
}  // namespace aq

AQ_EXPORT XLA_FFI_Error* aq_quantize_rows(XLA_FFI_CallFrame*);
AQ_EXPORT XLA_FFI_Error* aq_rotate_rows(XLA_FFI_CallFrame*);
AQ_EXPORT XLA_FFI_Error* aq_product(XLA_FFI_CallFrame*);
AQ_EXPORT XLA_FFI_Error* aq_product_of_codes(XLA_FFI_CallFrame*);
AQ_EXPORT XLA_FFI_Error* aq_rows(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_quantize_rows, aq::quantize_rows,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::S8>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<int64_t>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_rotate_rows, aq::rotate_rows,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<int64_t>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_product, aq::product,
                              aq::with_weight(aq::ffi::Ffi::Bind()
                                                  .Ctx<aq::ffi::ThreadPool>()
                                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_product_of_codes, aq::product_of_codes,
                              aq::with_weight(aq::ffi::Ffi::Bind()
                                                  .Ctx<aq::ffi::ThreadPool>()
                                                  .Arg<aq::ffi::Buffer<aq::ffi::S8>>()
                                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_rows, aq::rows,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::S32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::U8>>()
                                  .Arg<aq::ffi::AnyBuffer>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<aq::Attributes>("weight")
                                  .Attr<int64_t>("outputs"));
