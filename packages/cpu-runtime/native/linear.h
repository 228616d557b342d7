// One linear layer on a team of threads: norm (optional), prologue, multiplication, epilogue.
#pragma once

#include "kernel.h"
#include "pool.h"

namespace pareto {

enum class Norm : uint8_t { none, rms, layer };

// What is done to a row before it is multiplied: y = (x - mean) / sqrt(variance + epsilon) * weight + bias (layer), or
// y = x / sqrt(mean(x^2) + epsilon) * weight (rms).
struct Prologue {
  Norm norm = Norm::none;
  const float* weight = nullptr;  // (k)
  const float* bias = nullptr;    // (k) or null
  float epsilon = 0.0f;
};

// Normalise one row of k floats from x to y (which may be x).
void normalise(const Prologue& p, const float* x, float* y, int64_t k);

// Memory that `linear` works in, planned before the first call.
struct Workspace {
  uint8_t* shared = nullptr;   // the prepared rows
  uint8_t* threads = nullptr;  // `per_thread` bytes for each thread
  int64_t per_thread = 0;
};

// Bytes that `linear` needs at most for up to m rows: shared, and per thread.
int64_t shared_bytes(const Kernel& kernel, const Packed& w, int64_t m);
int64_t thread_bytes(const Kernel& kernel, const Packed& w);

// y = epilogue(norm(x) W^T) for m rows of x, `x_stride` floats apart. Called by every thread of the team; ends without
// a barrier. Where y is read by others next, or x is written, they wait for each other first.
void linear(Team& team, const Kernel& kernel, const Packed& w, const Prologue& prologue, const float* x,
            int64_t x_stride, int64_t m, const Epilogue& epilogue, const Workspace& workspace);

}  // namespace pareto
