// Attention.
#include "ffi.h"

namespace aq {
namespace {

// Every head of the keys of every text, on several threads; `one` is the first head of the first text, whose keys begin
// at `first` of each text.
void run(ffi::ThreadPool& pool, const Kernels& kernels, int64_t batch, int64_t heads, const int32_t* first,
         const Heads& one) {
  const int64_t q_text = one.tokens * one.q_width;
  const int64_t bytes = one.stored == Stored::float32 ? 4 : one.stored == Stored::bfloat16 ? 2 : 1;
  const int64_t items = batch * heads, work = 8 * items * one.tokens * one.shared * one.keys * one.size;
  const int64_t threads = threads_for(pool, work);
  const Parts parts(items, threads == 1 ? 1 : 4 * threads);  // texts differ in length
  parallel(pool, parts.parts, [&](int64_t part) {
    for (int64_t item = parts.first(part); item < parts.first(part + 1); ++item) {
      const int64_t text = item / heads, head = item % heads;
      const int64_t begin = first ? std::clamp<int64_t>(first[text], 0, one.keys) : 0, token = text * one.keys + begin;
      const int64_t q = text * q_text + head * one.shared * one.size, k = token * one.k_width + head * one.size;
      Heads its = one;
      its.q += q, its.out += q, its.first = begin, its.keys -= begin;
      its.k = static_cast<const char*>(one.k) + k * bytes, its.v = static_cast<const char*>(one.v) + k * bytes;
      if (one.stored == Stored::int8) {
        const int64_t scale = token * one.scale_width + head;
        its.k_scale += scale, its.v_scale += scale;
      }
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
  run(pool, *chosen, batch, heads, nullptr,
      {q.typed_data(), k.typed_data(), v.typed_data(), Stored::float32, nullptr, nullptr, mask.typed_data(), nullptr, 0,
       tokens, 1, tokens, size, width, width, 0, scale, cap, reach, out->typed_data()});
  return ffi::Error::Success();
}

ffi::Error cached_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k,
                            ffi::Buffer<ffi::F32> k_scale, ffi::AnyBuffer v, ffi::Buffer<ffi::F32> v_scale,
                            ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::S32> positions,
                            ffi::Result<ffi::Buffer<ffi::F32>> out, float scale, float cap, int64_t reach) {
  const Kernels* const chosen = choice;
  if (!chosen) return invalid("cached_attention", "no kernels for this processor");
  if (q.dimensions().size() != 4 || k.dimensions().size() != 4)
    return invalid("cached_attention", "wanted q [batch, tokens, heads, size], k [batch, positions, kv_heads, size]");
  const int64_t batch = q.dimensions()[0], tokens = q.dimensions()[1], heads = q.dimensions()[2],
                size = q.dimensions()[3], keys = k.dimensions()[1], shared = k.dimensions()[2];
  if (shared <= 0 || heads % shared) return invalid("cached_attention", "wanted key-value heads that divide the heads");
  const auto type = k.element_type();
  const Stored stored = type == ffi::S8 ? Stored::int8 : type == ffi::U16 ? Stored::bfloat16 : Stored::float32;
  if (v.element_type() != type || (stored == Stored::float32 && type != ffi::F32))
    return invalid("cached_attention", "wanted k and v of float32, of int8, or of the bits of bfloat16");
  if (!has_shape(k, {batch, keys, shared, size}) || !has_shape(v, {batch, keys, shared, size}) ||
      !has_shape(first, {batch}) || !has_shape(positions, {tokens}) || !has_shape(*out, {batch, tokens, heads, size}))
    return invalid("cached_attention", "wanted k and v [batch, positions, kv_heads, size], first [batch], "
                                       "positions [tokens], out as q");
  const int64_t scales = stored == Stored::int8 ? keys : 0;
  if (!has_shape(k_scale, {batch, scales, shared}) || !has_shape(v_scale, {batch, scales, shared}))
    return invalid("cached_attention", "wanted scales [batch, positions, kv_heads] of codes, and of codes alone");
  if (!q.element_count()) return ffi::Error::Success();
  run(pool, *chosen, batch, shared, first.typed_data(),
      {q.typed_data(), k.untyped_data(), v.untyped_data(), stored, k_scale.typed_data(), v_scale.typed_data(), nullptr,
       positions.typed_data(), 0, tokens, heads / shared, keys, size, heads * size, shared * size, shared, scale, cap,
       reach, out->typed_data()});
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
                                  .Arg<aq::ffi::AnyBuffer>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::AnyBuffer>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::S32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::S32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("reach"));
