// The calls that XLA makes. Shapes are checked here, before a kernel touches anything.
#include <atomic>
#include <string>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace aq {
namespace {

std::atomic<const Kernels*> choice{*available()};

constexpr int64_t BLOCK = 64;  // rows whose inputs and outputs stay in a core's second cache

// The threads for so many products of bytes, or as much other work: a second one costs more than a little work takes.
int64_t threads_for(const ffi::ThreadPool& pool, int64_t work) {
  return work > 1 << 22 ? std::max<int64_t>(1, pool.num_threads()) : 1;
}

ffi::Error invalid(const char* call, const std::string& what) {
  return ffi::Error::InvalidArgument(std::string(call) + ": " + what);
}

template <class Buffer>
bool has_shape(Buffer& buffer, std::initializer_list<int64_t> wanted) {
  auto found = buffer.dimensions();
  return found.size() == wanted.size() && std::equal(found.begin(), found.end(), wanted.begin());
}

// `count` things in parts as equal as can be: how many parts, and the first thing of part i.
struct Parts {
  int64_t count, parts;
  Parts(int64_t count, int64_t parts) : count(count), parts(std::max<int64_t>(1, std::min(parts, count))) {}
  int64_t first(int64_t i) const { return count * i / parts; }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

std::string list(const Kernels* const* kernels) {
  std::string names;
  for (; *kernels; ++kernels) names += std::string(names.empty() ? "\"" : ", \"") + (*kernels)->isa + "\"";
  return "[" + names + "]";
}

}  // namespace
}  // namespace aq

// All else is hidden, from other libraries of the process too.
#define AQ_EXPORT extern "C" __attribute__((visibility("default")))

AQ_EXPORT XLA_FFI_Error* aq_quantize_rows(XLA_FFI_CallFrame*);
AQ_EXPORT XLA_FFI_Error* aq_product(XLA_FFI_CallFrame*);
AQ_EXPORT XLA_FFI_Error* aq_attention(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_quantize_rows, aq::quantize_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_product, aq::product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("act")
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aq_attention, aq::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("heads"));

// What this library is made of, and the instruction set that it uses ("" for none), as JSON; for one thread at a time.
AQ_EXPORT const char* aq_native_info() {
  static std::string info;
  const aq::Kernels* const chosen = aq::choice;
  info = "{\"sources\": \"" AQ_SOURCES "\", \"ffi\": [" + std::to_string(XLA_FFI_API_MAJOR) + ", " +
         std::to_string(XLA_FFI_API_MINOR) + "], \"built\": " + aq::list(aq::built()) + ", \"chosen\": \"" +
         (chosen ? chosen->isa : "") + "\"}";
  return info.c_str();
}

// The instruction sets that this processor has, best first, as JSON.
AQ_EXPORT const char* aq_native_available() {
  static const std::string names = aq::list(aq::available());
  return names.c_str();
}

// Use this instruction set from now on; return 0 if this processor or this library lacks it.
AQ_EXPORT int aq_native_choose(const char* isa) {
  for (auto* kernels = aq::available(); *kernels; ++kernels)
    if (std::string(isa) == (*kernels)->isa) {
      aq::choice = *kernels;
      return 1;
    }
  return 0;
}
