// (batch, rows, columns) to (batch, columns, rows) in fp32: what stands between a model's layout and the kernels'.
#pragma once

#include <cstdint>

namespace pareto {

struct TurnShape {
  int64_t batch, rows, columns;
};

void turn(TurnShape shape, const float* from, float* to, int threads);

}  // namespace pareto
