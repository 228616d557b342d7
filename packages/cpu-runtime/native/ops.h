// What lies between the matrix multiplications, as functions of plain arrays. The text is in ops.inl and is compiled three
// times: for any x86-64, for AVX2 and for AVX-512.
#pragma once

#include <cstdint>

#include "linear.h"

namespace pareto {

struct Ops {
  const char* name;
  void (*normalise)(const Prologue& p, const float* x, float* y, int64_t k);
};

// The best for this processor.
const Ops& ops();

}  // namespace pareto
