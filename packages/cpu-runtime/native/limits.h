// What this machine can do at most: the limits that the kernels' figures stand beside.
#pragma once

#include <cstdint>

namespace pareto {

struct Limits {
  // Read `bytes` at `data`, front to back, every byte once; returns something that depends on all of them.
  int64_t (*read)(const uint8_t* data, int64_t bytes);
  // `rounds` rounds of independent int8 products; null where there is no instruction for them.
  int64_t (*multiply)(int64_t rounds);
  // Multiply-adds of one round.
  int64_t multiply_adds;
};

// For the best instruction set of this processor.
const Limits& limits();

}  // namespace pareto
