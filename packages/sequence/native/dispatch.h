// Which kernels run here.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pareto {

// The kernels of that name, or of the best instruction set available where `name` is empty; null where there is none of
// that name, or the processor lacks it.
const Kernels* find_kernels(const char* name);

// Every instruction set that is available, the least first.
std::vector<std::string> available_names();

}  // namespace pareto
