// Weights become codes and grids: for XLA, and for programs without it.
#include "ffi.h"
#include "own_threads.h"

#include <cstring>
#include <memory>

namespace aq {
namespace {

constexpr int64_t LONGEST_SEARCHED = 1 << 18;

// Quantize all groups; set the flags, and return what is wrong, or null.
template <class Pool>
const char* quantize_all(Pool& pool, const Groups& in, int& flags) {
  const Kernels* const chosen = choice;
  if (!chosen) return "no kernels for this processor";
  if (in.bits < 2 || in.bits > 8) return "wanted 2 to 8 bits";
  if (in.count < 0 || in.group <= 0) return "wanted groups";
  if (in.packed && in.bits < 8 && in.group * in.bits % 8 && in.group < in.count) return "wanted groups of whole bytes";
  if (in.method < Method::absmax || in.method > Method::affine) return "wanted a method";
  const bool searches = in.method >= Method::mid_tread;
  if (searches && (in.search.count < 1 || in.search.count > MAX_STARTS)) return "wanted 1 to 16 starts";
  if (searches && in.group > LONGEST_SEARCHED) return "wanted groups that a cache holds";
  const int64_t groups = ceil_div(in.count, in.group);
  const int64_t threads = threads_for_elements(pool, (searches ? 32 : 1) * in.count);
  const int64_t step = std::max<int64_t>(16, ceil_div(1 << 14, in.group) / 16 * 16);  // groups that go together
  const Parts parts(ceil_div(groups, step), threads == 1 ? 1 : 8 * threads);
  std::atomic<int> found{0};
  parallel(pool, parts.parts, [&](int64_t i) {
    found |= chosen->quantize(in, parts.first(i) * step, std::min(groups, parts.first(i + 1) * step));
  });
  flags = found;
  return nullptr;
}

// The sums of all groups, added in their order, whatever threads found them.
void add_up(const Groups& in, double (&all)[3]) {
  for (double& each : all) each = 0;
  for (int64_t g = 0; g < ceil_div(in.count, in.group); ++g)
    for (int i = 0; i < 3; ++i) all[i] += in.sums[3 * g + i];
}

double error_of(const Groups& in) {
  double all[3];
  add_up(in, all);
  return all[2];
}

// Quantize by one method, or by the better of two: that with the smaller squared error of the whole tensor.
ffi::Error quantize(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> w, ffi::Result<ffi::AnyBuffer> codes,
                    ffi::Result<ffi::Buffer<ffi::F32>> scale, ffi::Result<ffi::Buffer<ffi::F32>> zero,
                    ffi::Result<ffi::Buffer<ffi::S32>> flags, int64_t group, int64_t bits,
                    ffi::Span<const int64_t> methods, ffi::Span<const float> starts, int64_t rounds) {
  const int64_t count = w.element_count(), groups = group > 0 ? ceil_div(count, group) : -1;
  const bool packed = codes->element_type() == ffi::U8;
  if (!packed && codes->element_type() != ffi::S8) return invalid("quantize", "wanted codes of int8, or bytes");
  if (int64_t(scale->element_count()) != groups || int64_t(zero->element_count()) != groups)
    return invalid("quantize", "wanted a scale and a zero point for each group");
  if (int64_t(codes->size_bytes()) != (packed ? ceil_div(count * bits, 8) : count) || !has_shape(*flags, {1}))
    return invalid("quantize", "wanted a code for each element, and flags [1]");
  if (methods.size() < 1 || methods.size() > 2) return invalid("quantize", "wanted one or two methods");
  const bool two = methods.size() == 2;
  std::unique_ptr<double[]> sums(two ? new double[3 * groups] : nullptr);
  Groups in = {w.typed_data(),  nullptr, count, group, int(bits), Method(*methods.begin()),
               {starts.begin(), int64_t(starts.size()), rounds}, packed,
               static_cast<uint8_t*>(codes->untyped_data()), scale->typed_data(), zero->typed_data(), sums.get()};
  int found = 0;
  if (const char* wrong = quantize_all(pool, in, found)) return invalid("quantize", wrong);
  if (two) {
    const double first = error_of(in);
    const size_t bytes = codes->size_bytes();
    std::unique_ptr<uint8_t[]> other(new uint8_t[bytes]);
    std::unique_ptr<float[]> grids(new float[2 * groups]);
    in.method = Method(*(methods.begin() + 1));
    in.codes = other.get(), in.scale = grids.get(), in.zero = grids.get() + groups;
    int second = 0;
    if (const char* wrong = quantize_all(pool, in, second)) return invalid("quantize", wrong);
    if (error_of(in) < first) {
      std::memcpy(codes->untyped_data(), other.get(), bytes);
      std::memcpy(scale->typed_data(), in.scale, 4 * groups);
      std::memcpy(zero->typed_data(), in.zero, 4 * groups);
      found = second;
    }
  }
  *flags->typed_data() = found;
  return ffi::Error::Success();
}

}  // namespace
}  // namespace aq

// Return what is wrong, or null; the sums are those of all groups.
AQ_EXPORT const char* aq_quantize_groups(const void* w, int64_t is_half, int64_t count, int64_t group, int64_t bits,
                                         int64_t method, const float* starts, int64_t start_count, int64_t rounds,
                                         int64_t packed, int64_t threads, uint8_t* codes, float* scale, float* zero,
                                         double (*sums)[3], int32_t* flags) {
  if (count < 0 || group <= 0) return "wanted groups";
  aq::OwnThreads pool(threads);
  const std::unique_ptr<double[]> own(new double[3 * aq::ceil_div(count, group)]);
  const aq::Groups in = {is_half ? nullptr : static_cast<const float*>(w),
                         is_half ? static_cast<const uint16_t*>(w) : nullptr,
                         count, group, int(bits), aq::Method(method), {starts, start_count, rounds}, packed != 0,
                         codes, scale, zero, own.get()};
  const char* const wrong = aq::quantize_all(pool, in, *flags);
  if (!wrong) aq::add_up(in, *sums);
  return wrong;
}

AQ_EXPORT XLA_FFI_Error* aq_quantize(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_quantize, aq::quantize,
                              aq::ffi::Ffi::Bind()
                                  .Ctx<aq::ffi::ThreadPool>()
                                  .Arg<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::AnyBuffer>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::F32>>()
                                  .Ret<aq::ffi::Buffer<aq::ffi::S32>>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("bits")
                                  .Attr<aq::ffi::Span<const int64_t>>("methods")
                                  .Attr<aq::ffi::Span<const float>>("starts")
                                  .Attr<int64_t>("rounds"));
