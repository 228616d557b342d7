// The inner loops, one table of them for each instruction set. Included where the code is compiled for one: nothing of
// the standard library here.
#pragma once

#include <cstdint>

#include "isa.h"

namespace pareto {

// Positions that a kernel takes together: rows are walked in blocks of this many.
constexpr int64_t kBlock = 64;
// Lanes of the widest vector.
constexpr int kMostLanes = 16;

struct Kernels {
  const char* name;
  Isa isa;
  int lanes;

  // y[i] = bias + sum over k < taps of weight[k] * source[k][i], for i < blocks * kBlock.
  void (*run)(float* y, const float* const* source, const float* weight, int64_t taps, float bias, int64_t blocks);

  // sums[k * lanes + ...] += grad[i] * source[k][at + i], for k < taps and i < blocks * kBlock: summing the lanes of k
  // gives the inner product of `grad` and source k.
  void (*dots)(const float* grad, const float* const* source, int64_t at, int64_t taps, int64_t blocks, float* sums);

  // The sum of `count` values: in fp32 over a few thousand at a time, those sums in double.
  double (*sum)(const float* values, int64_t count);
};

}  // namespace pareto
