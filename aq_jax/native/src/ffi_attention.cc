// Attention.
#include "ffi.h"

namespace aq {
namespace {

// Every head of the keys of every text, on several threads; `one` is the first head of the first text.
void run(ffi::ThreadPool& pool, const Kernels& kernels, int64_t batch, int64_t heads, int64_t q_text, int64_t k_text,
         const Heads& one) {
  const int64_t items = batch * heads, work = 8 * items * one.tokens * one.shared * one.keys * one.size;
  const int64_t threads = threads_for(pool, work);
  const Parts parts(items, threads == 1 ? 1 : 4 * threads);  // texts differ in length
  parallel(pool, parts.parts, [&](int64_t part) {
    for (int64_t item = parts.first(part); item < parts.first(part + 1); ++item) {
      const int64_t text = item / heads, head = item % heads;
      const int64_t q = text * q_text + head * one.shared * one.size, k = text * k_text + head * one.size;
      Heads its = one;
      its.q += q, its.k += k, its.v += k, its.out += q;
      if (its.mask) its.mask += text * one.keys;
      kernels.attention(its);
    }
  });
}

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                     ffi::Buffer<ffi::PRED> mask, ffi::Result<ffi::Buffer<ffi::F32>> out, int64_t heads, float scale,
                     float cap, int64_t reach) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("attention", "no kernels for this processor");
  if (q.dimensions().size() != 3) return invalid("attention", "wanted q [batch, tokens, width]");
  const int64_t batch = q.dimensions()[0], tokens = q.dimensions()[1], width = q.dimensions()[2];
  if (heads <= 0 || width % heads) return invalid("attention", "wanted heads that divide the width");
  if (!has_shape(k, {batch, tokens, width}) || !has_shape(v, {batch, tokens, width}) ||
      !has_shape(mask, {batch, tokens}) || !has_shape(*out, {batch, tokens, width}))
    return invalid("attention", "wanted q, k, v and out [batch, tokens, width], mask [batch, tokens]");
  if (!q.element_count()) return ffi::Error::Success();
  const int64_t size = width / heads;
  run(pool, *chosen, batch, heads, tokens * width, tokens * width,
      {q.typed_data(), k.typed_data(), v.typed_data(), mask.typed_data(), nullptr, tokens, 1, tokens, size, width,
       width, scale, cap, reach, out->typed_data()});
  return ffi::Error::Success();
}

ffi::Error cached_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                            ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> positions,
                            ffi::Result<ffi::Buffer<ffi::F32>> out, float scale, float cap, int64_t reach) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("cached_attention", "no kernels for this processor");
  if (q.dimensions().size() != 4 || k.dimensions().size() != 4)
    return invalid("cached_attention", "wanted q [batch, tokens, heads, size], k [batch, positions, kv_heads, size]");
  const int64_t batch = q.dimensions()[0], tokens = q.dimensions()[1], heads = q.dimensions()[2],
                size = q.dimensions()[3], keys = k.dimensions()[1], shared = k.dimensions()[2];
  if (shared <= 0 || heads % shared) return invalid("cached_attention", "wanted key-value heads that divide the heads");
  if (!has_shape(k, {batch, keys, shared, size}) || !has_shape(v, {batch, keys, shared, size}) ||
      !has_shape(positions, {tokens}) || !has_shape(*out, {batch, tokens, heads, size}))
    return invalid("cached_attention",
                   "wanted k and v [batch, positions, kv_heads, size], positions [tokens], out as q");
  if (!q.element_count()) return ffi::Error::Success();
  run(pool, *chosen, batch, shared, tokens * heads * size, keys * shared * size,
      {q.typed_data(), k.typed_data(), v.typed_data(), nullptr, positions.typed_data(), tokens, heads / shared, keys,
       size, heads * size, shared * size, scale, cap, reach, out->typed_data()});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace aq

AQ_EXPORT XLA_FFI_Error* aq_attention(XLA_FFI_CallFrame*);
AQ_EXPORT XLA_FFI_Error* aq_cached_attention(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_attention, aq::attention,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::PRED>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<int64_t>("heads")
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("reach"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_cached_attention, aq::cached_attention,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::S32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("reach"));
