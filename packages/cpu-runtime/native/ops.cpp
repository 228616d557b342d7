#include "ops.h"

#include <cstring>

#include "isa.h"

namespace pareto {

extern const Ops kOpsBaseline, kOpsAvx2, kOpsAvx512, kOpsAvx512Bf16;

const Ops* ops_named(const char* name) {
  if (std::strcmp(name, "auto") == 0) return &ops();
  const struct {
    const Ops* ops;
    Isa isa;
  } all[] = {{&kOpsAvx512Bf16, Isa::avx512_bf16},
             {&kOpsAvx512, Isa::avx512f},
             {&kOpsAvx2, Isa::avx2},
             {&kOpsBaseline, Isa::scalar}};
  for (const auto& [one, isa] : all)
    if (available(isa) && std::strcmp(name, one->name) == 0) return one;
  return nullptr;
}

}  // namespace pareto
