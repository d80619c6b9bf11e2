// Which kernels there are, and which this processor runs. By CPUID and XGETBV, or what Linux says of an Arm processor:
// __builtin_cpu_supports finds nothing in some builds, and says nothing.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace aq {

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
#else
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

struct Entry {
  const Kernels* kernels;
  bool runs;
};

#if defined(__x86_64__)
struct Found {
  bool avx2 = false, avx512vnni = false;

  Found() {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, saves = c >> 27 & 1;  // the system saves wide registers
    if (!fma || !saves || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
    avx2 = (low & 0x06) == 0x06 && b >> 5 & 1;
    avx512vnni = avx2 && (low & 0xe6) == 0xe6 && f && dq && bw && vl && vnni;
  }
};
#else
struct Found {
#if defined(__linux__)
  bool neon = getauxval(AT_HWCAP) >> 20 & 1;  // dot products
#else
  bool neon = true;  // every 64-bit processor of Apple's has them
#endif
};
#endif

struct Table {
  const Kernels* built[3] = {};
  const Kernels* available[3] = {};

  Table() {
    const Found found;
#if defined(__x86_64__)
    const Entry entries[] = {{&avx512vnni::kernels, found.avx512vnni}, {&avx2::kernels, found.avx2}};
#else
    const Entry entries[] = {{&neon::kernels, found.neon}};
#endif
    const Kernels **all = built, **running = available;
    for (const Entry& entry : entries) {
      *all++ = entry.kernels;
      if (entry.runs) *running++ = entry.kernels;
    }
  }
};

const Table& table() {
  static const Table once;
  return once;
}

}  // namespace

const Kernels* const* built() { return table().built; }
const Kernels* const* available() { return table().available; }

}  // namespace aq
