// What lies between the matrix multiplications, as functions of plain arrays. The text is in ops.inl and attention.inl
// and is compiled four times: for any x86-64, for AVX2, for AVX-512 and for AVX-512 with its products of bf16 numbers.
#pragma once

#include <cstdint>

#include "attention.h"
#include "linear.h"

namespace pareto {

struct Ops {
  const char* name;
  void (*normalise)(const Prologue& p, const float* x, float* y, int64_t k);
  // Turn one head vector by the angles of its position.
  void (*rotate)(const Rotary& rotary, int64_t position, float* x);
  // Store a key and a value (head_dim floats each) at a position of a plane.
  void (*append)(CacheType type, const Plane& plane, int64_t head_dim, int64_t position, const float* key,
                 const float* value);
  // The partial results (count, state_floats) of the queries over chunks [first, last); `scratch` has attend_floats.
  void (*attend)(CacheType type, const Plane& plane, const Queries& queries, int64_t first, int64_t last, float* states,
                 float* scratch);
  // Join the partial result `later` to `state`.
  void (*join)(int64_t head_dim, float* state, const float* later);
  // y (head_dim) = the weighted values divided by their sum.
  void (*conclude)(int64_t head_dim, const float* state, float* y);
};

// The best for this processor.
const Ops& ops();

// Those called `name` (of an instruction set), the best where it is "auto"; null where this processor has none such.
const Ops* ops_named(const char* name);

}  // namespace pareto
