// Included by each of the ops_*.cpp, which are compiled for their instruction sets; see epilogue.inl for why everything
// is in an unnamed namespace.
#include <cmath>

#include "attention.inl"
#include "epilogue.inl"
#include "ops.h"

namespace pareto {
namespace {

// Sums run in 16 lanes, so that every instruction set adds in the same order.
constexpr int64_t kSumLanes = 16;

template <typename Term>
inline float sum_of(int64_t count, Term term) {
  float lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes)
    for (int64_t lane = 0; lane < kSumLanes; ++lane) lanes[lane] += term(i + lane);
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  for (int64_t width = kSumLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

void normalise_row(const Prologue& p, const float* x, float* y, int64_t k) {
  float mean = 0.0f;
  if (p.norm == Norm::layer) mean = sum_of(k, [x](int64_t i) { return x[i]; }) / static_cast<float>(k);
  const float square = sum_of(k, [x, mean](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  const float scale = 1.0f / std::sqrt(square / static_cast<float>(k) + p.epsilon);
  for (int64_t i = 0; i < k; ++i) y[i] = (x[i] - mean) * scale;
  if (p.weight)
    for (int64_t i = 0; i < k; ++i) y[i] *= p.weight[i];
  if (p.bias)
    for (int64_t i = 0; i < k; ++i) y[i] += p.bias[i];
}

}  // namespace

extern const Ops PARETO_OPS;
const Ops PARETO_OPS = {PARETO_OPS_NAME, normalise_row, rotate, append, attend, join, conclude};

}  // namespace pareto
