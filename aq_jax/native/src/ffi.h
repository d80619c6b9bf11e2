// What the calls that XLA makes have in common: each checks all shapes before a kernel touches anything.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <string>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

// A function that the library exports; all else is hidden, from other libraries of the process too.
#define AQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace aq {

namespace ffi = xla::ffi;

extern std::atomic<const Kernels*> choice;

// The threads for so many products of bytes, or as much other work: a second one costs more than a little work takes.
inline int64_t threads_for(const ffi::ThreadPool& pool, int64_t work) {
  return work > 1 << 22 ? std::max<int64_t>(1, pool.num_threads()) : 1;
}

// The threads for so many elements to be decoded or rounded: each of XLA's gets 0.05 ms of work, or more.
inline int64_t threads_for_elements(const ffi::ThreadPool& pool, int64_t count) {
  return std::clamp<int64_t>(count >> 17, 1, std::max<int64_t>(1, pool.num_threads()));
}

inline ffi::Error invalid(const char* call, const std::string& what) {
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace aq
