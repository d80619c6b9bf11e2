// Attention.
#include "ffi.h"

namespace aq {
namespace {

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                     ffi::Buffer<ffi::PRED> mask, ffi::Result<ffi::Buffer<ffi::F32>> out, int64_t heads) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("attention", "no kernels for this processor");
  if (q.dimensions().size() != 3) return invalid("attention", "wanted q [batch, tokens, width]");
  const int64_t batch = q.dimensions()[0], tokens = q.dimensions()[1], width = q.dimensions()[2];
  if (heads <= 0 || width % heads) return invalid("attention", "wanted heads that divide the width");
  if (!has_shape(k, {batch, tokens, width}) || !has_shape(v, {batch, tokens, width}) ||
      !has_shape(mask, {batch, tokens}) || !has_shape(*out, {batch, tokens, width}))
    return invalid("attention", "wanted q, k, v and out [batch, tokens, width], mask [batch, tokens]");
  if (!q.element_count()) return ffi::Error::Success();
  const int64_t size = width / heads, items = batch * heads;
  const int64_t threads = threads_for(pool, 8 * batch * tokens * tokens * width);
  const Parts parts(items, threads == 1 ? 1 : 4 * threads);  // texts differ in length
  parallel(pool, parts.parts, [&](int64_t part) {
    for (int64_t item = parts.first(part); item < parts.first(part + 1); ++item) {
      const int64_t text = item / heads, at = text * tokens * width + item % heads * size;
      chosen->attention(q.typed_data() + at, k.typed_data() + at, v.typed_data() + at,
                        mask.typed_data() + text * tokens, tokens, size, width, out->typed_data() + at);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace aq

AQ_EXPORT XLA_FFI_Error* aq_attention(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_attention, aq::attention,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::PRED>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<int64_t>("heads"));
