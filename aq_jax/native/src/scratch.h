// Memory that a thread keeps between calls, so that no call waits for fresh pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace aq {
namespace AQ_ISA {  // or the linker would keep one instruction set's code for all

class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    thread_local Memory memory;
    memory.reserve(bytes + 64);
    next_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.bytes) + 63) & ~uintptr_t(63));
  }

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return taken;
  }

  template <class T>
  static size_t bytes(int64_t count) {
    return (count * sizeof(T) + 63) & ~size_t(63);
  }

 private:
  struct Memory {
    char* bytes = nullptr;
    size_t size = 0;

    void reserve(size_t wanted) {
      if (size >= wanted) return;
      std::free(bytes);
      bytes = static_cast<char*>(std::malloc(wanted));
      if (!bytes) std::abort();
      size = wanted;
    }
    ~Memory() { std::free(bytes); }
  };
  char* next_;
};

}  // namespace AQ_ISA
}  // namespace aq
