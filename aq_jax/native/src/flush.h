// Subnormal numbers count as zero, as they do in XLA's programs; threads that call from elsewhere keep them otherwise.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace aq {
namespace AQ_ISA {

class Flush {
 public:
  Flush() : before_(get()) { set(before_ | BITS); }
  ~Flush() { set(before_); }
  Flush(const Flush&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t BITS = 0x8040;  // results, and operands
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t bits) { _mm_setcsr(uint32_t(bits)); }
#else
  static constexpr uint64_t BITS = 1 << 24;
  static uint64_t get() {
    uint64_t bits;
    __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void set(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#endif
  uint64_t before_;
};

}  // namespace AQ_ISA
}  // namespace aq
