#include "isa.h"

#include <cstdint>

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace pareto {
namespace {

struct Features {
  bool avx2 = false, avx512f = false;

#ifdef __x86_64__
  Features() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d)) return;
    const bool fma = (c >> 12) & 1u, saves = (c >> 27) & 1u;
    if (!fma || !saves || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    avx2 = (low & 0x6) == 0x6 && ((b >> 5) & 1u);
    avx512f = avx2 && (low & 0xe6) == 0xe6 && ((b >> 16) & 1u);
  }
#endif
};

}  // namespace

bool available(Isa isa) {
  static const Features features;
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return features.avx2;
    case Isa::avx512f:
      return features.avx512f;
  }
  return false;
}

}  // namespace pareto
