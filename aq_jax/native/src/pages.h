// Large pages for large results: writing to fresh memory costs more, page by page, than decoding does. Smaller results
// lie in memory that malloc keeps. On a virtual machine large pages may be memory that nobody has touched: 64 MB took
// 365 ms once, and 15 from then on, where small pages took 55.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace aq {

inline void want_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 1 << 21;
  if (bytes < int64_t(16 * PAGE)) return;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(PAGE - 1);
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // if it fails, pages are small
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace aq
