#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace pareto {
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// The register states that the operating system saves; 0 where it saves none.
uint64_t saved_states(const Registers& basic) {
  if (!bit(basic.ecx, 27)) return 0;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the tile registers to a process that asks for them.
bool tiles_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Features {
  bool avx2, avx512f, avx_vnni, avx512_vnni, avx512_bf16, avx512_fp16, amx_int8, amx_bf16;

  Features() {
    const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
    const uint64_t saved = saved_states(basic);
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
    const bool fma = bit(basic.ecx, 12), f16c = bit(basic.ecx, 29);
    avx2 = ymm && fma && f16c && bit(extended.ebx, 5);
    // F, DQ, BW and VL come together on every processor with VNNI; the kernels use all four.
    avx512f =
        avx2 && zmm && bit(extended.ebx, 16) && bit(extended.ebx, 17) && bit(extended.ebx, 30) && bit(extended.ebx, 31);
    avx_vnni = avx2 && bit(more.eax, 4);
    avx512_vnni = avx512f && bit(extended.ecx, 11);
    avx512_bf16 = avx512f && bit(more.eax, 5);
    avx512_fp16 = avx512f && bit(extended.edx, 23);
    const bool amx = avx512f && tiles && bit(extended.edx, 24);
    amx_int8 = amx && bit(extended.edx, 25) && tiles_granted();
    amx_bf16 = amx && bit(extended.edx, 22) && tiles_granted();
#ifdef PARETO_EMULATE
    avx_vnni = avx512_fp16 = amx_int8 = amx_bf16 = avx512_vnni && avx512_bf16;
#endif
  }
};

constexpr Isa kAll[] = {Isa::scalar,      Isa::avx2,        Isa::avx512f,  Isa::avx_vnni, Isa::avx512_vnni,
                        Isa::avx512_bf16, Isa::avx512_fp16, Isa::amx_int8, Isa::amx_bf16};

}  // namespace

bool available(Isa isa) {
  static const Features features;
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return features.avx2;
    case Isa::avx512f:
      return features.avx512f;
    case Isa::avx_vnni:
      return features.avx_vnni;
    case Isa::avx512_vnni:
      return features.avx512_vnni;
    case Isa::avx512_bf16:
      return features.avx512_bf16;
    case Isa::avx512_fp16:
      return features.avx512_fp16;
    case Isa::amx_int8:
      return features.amx_int8;
    case Isa::amx_bf16:
      return features.amx_bf16;
  }
  return false;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512f:
      return "avx512f";
    case Isa::avx_vnni:
      return "avx_vnni";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512_fp16:
      return "avx512_fp16";
    case Isa::amx_int8:
      return "amx_int8";
    case Isa::amx_bf16:
      return "amx_bf16";
  }
  return "?";
}

std::vector<std::string> available_names() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (available(isa)) names.emplace_back(name(isa));
  return names;
}

}  // namespace pareto
