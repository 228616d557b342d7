// Chooses, once per weight matrix, the kernel that multiplies it, and once per process the operations between.
#include <cstring>

#include "kernel.h"
#include "ops.h"

namespace pareto {

extern const Kernel kScalar, kAvx2, kAvx512f, kAvxVnni, kAvx512Vnni, kAvx512Bf16, kAvx512Fp16, kAmxInt8, kAmxBf16;
extern const Ops kOpsBaseline, kOpsAvx2, kOpsAvx512, kOpsAvx512Bf16;

const std::vector<const Kernel*>& kernels() {
  // Best first: int8, then 16 bits, then fp32; within each, wider before narrower.
  static const std::vector<const Kernel*> all = {&kAmxInt8,    &kAvx512Vnni, &kAvxVnni, &kAmxBf16, &kAvx512Bf16,
                                                 &kAvx512Fp16, &kAvx512f,    &kAvx2,    &kScalar};
  return all;
}

const Kernel* choose(const Packed& w, const char* name, const char* compute) {
  const bool any = std::strcmp(name, "auto") == 0;
  for (const Kernel* kernel : kernels()) {
    if (!available(kernel->isa) || !kernel->supports(w)) continue;
    if (any ? (!*compute || std::strcmp(compute, kernel->compute) == 0) : std::strcmp(name, kernel->name) == 0)
      return kernel;
  }
  return nullptr;
}

const Ops& ops() {
  static const Ops& best = available(Isa::avx512_bf16) ? kOpsAvx512Bf16
                           : available(Isa::avx512f)   ? kOpsAvx512
                           : available(Isa::avx2)      ? kOpsAvx2
                                                       : kOpsBaseline;
  return best;
}

void normalise(const Prologue& p, const float* x, float* y, int64_t k) { ops().normalise(p, x, y, k); }

}  // namespace pareto
