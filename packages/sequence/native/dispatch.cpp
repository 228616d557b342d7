#include "dispatch.h"

#include <cstring>

namespace pareto {

extern const Kernels kBaseline;
#ifdef __x86_64__
extern const Kernels kAvx2;
extern const Kernels kAvx512f;
#endif

namespace {

const Kernels* const kAll[] = {
    &kBaseline,
#ifdef __x86_64__
    &kAvx2,
    &kAvx512f,
#endif
};

}  // namespace

const Kernels* find_kernels(const char* name) {
  const Kernels* found = nullptr;
  for (const Kernels* kernels : kAll)
    if (available(kernels->isa) && (*name == 0 || std::strcmp(name, kernels->name) == 0)) found = kernels;
  return found;
}

std::vector<std::string> available_names() {
  std::vector<std::string> names;
  for (const Kernels* kernels : kAll)
    if (available(kernels->isa)) names.emplace_back(kernels->name);
  return names;
}

}  // namespace pareto
