// Print how many 8-bit multiplications and additions a core does in a second, at most: dot products of registers alone.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#define DOT(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"

int main() {
  double best = 0;
  for (int round = 0; round < 20; ++round) {
    const long count = 2000000;
    const auto start = std::chrono::steady_clock::now();
    for (long i = 0; i < count; ++i)
      __asm__ volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11)
                       : : : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::max(best, count * 12 * 128 / taken.count());
  }
  std::printf("%.0f\n", best);
}
