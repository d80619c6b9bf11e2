// Values of codes: for XLA, and for programs without it.
#include "ffi.h"
#include "own_threads.h"
#include "pages.h"

namespace aq {
namespace {

constexpr int64_t STEP = 1 << 14;  // elements of which each part has a multiple

// Decode a tensor; return what is wrong, or null.
template <class Pool>
const char* decode(Pool& pool, const Codes& codes, int64_t grids, int64_t count, float* out) {
  const Kernels* const chosen = choice;
  if (!chosen) return "no kernels for this processor";
  if (codes.bits < 1 || codes.bits > 8) return "wanted 1 to 8 bits";
  if (codes.group <= 0 || grids < ceil_div(count, codes.group)) return "wanted a grid for each group";
  if (codes.bytes < ceil_div(count * codes.bits, 8)) return "wanted a code for each element";
  want_large_pages(out, 4 * count);
  const int64_t threads = threads_for_elements(pool, count);
  const Parts parts(ceil_div(count, STEP), threads == 1 ? 1 : 4 * threads);
  parallel(pool, parts.parts, [&](int64_t i) {
    const int64_t first = parts.first(i) * STEP, last = std::min(count, parts.first(i + 1) * STEP);
    chosen->dequantize(codes, first, last, out + first);
  });
  return nullptr;
}

ffi::Error dequantize(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::Buffer<ffi::F32> scale,
                      ffi::Buffer<ffi::F32> zero, ffi::Buffer<ffi::F32> minimum,
                      ffi::Result<ffi::Buffer<ffi::F32>> out, int64_t bits, int64_t group) {
  if (codes.element_type() != ffi::S8 && codes.element_type() != ffi::U8)
    return invalid("dequantize", "wanted codes of int8, or bytes");
  for (auto& offsets : {zero, minimum})
    if (offsets.element_count() && offsets.element_count() != scale.element_count())
      return invalid("dequantize", "wanted as many zero points and minimums as scales, or none");
  const Codes in = {static_cast<const uint8_t*>(codes.untyped_data()),
                    int64_t(codes.size_bytes()),
                    codes.element_type() == ffi::S8 ? 8 : int(bits),
                    scale.typed_data(),
                    zero.element_count() ? zero.typed_data() : nullptr,
                    minimum.element_count() ? minimum.typed_data() : nullptr,
                    group};
  const char* wrong = decode(pool, in, scale.element_count(), out->element_count(), out->typed_data());
  return wrong ? invalid("dequantize", wrong) : ffi::Error::Success();
}

}  // namespace
}  // namespace aq

// Return what is wrong, or null.
AQ_EXPORT const char* aq_decode(const uint8_t* stream, int64_t bytes, int64_t bits, const float* scale,
                                const float* zero, const float* minimum, int64_t grids, int64_t group, int64_t count,
                                int64_t threads, float* out) {
  aq::OwnThreads pool(threads);
  return aq::decode(pool, {stream, bytes, int(bits), scale, zero, minimum, group}, grids, count, out);
}

AQ_EXPORT XLA_FFI_Error* aq_dequantize(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_dequantize, aq::dequantize,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::AnyBuffer>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group"));
