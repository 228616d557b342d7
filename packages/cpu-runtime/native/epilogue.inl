// The epilogue of every kernel. Plain loops that the compiler vectorises: each kernel file includes this text and so
// compiles it for its own instruction set. Everything is in an unnamed namespace, so that no two files share code.
#pragma once

#include <cmath>
#include <cstring>

#include "kernel.h"

namespace pareto {
namespace {

// exp(x), relative error below 2e-7 in the range where neither x nor exp(x) leaves fp32's normal numbers.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = std::nearbyint(x * 1.44269504088896341f);
  const float r = __builtin_fmaf(n, -1.42860682030941723e-6f, __builtin_fmaf(n, -0.693145751953125f, x));
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r) + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// erf by W. J. Cody's forms is long; the error function here is 1 - t * polynomial * exp(-x^2) (Abramowitz and Stegun
// 7.1.26 has 1.5e-7 absolute error), enough for an activation that is stored as fp32.
inline float erf_of(float x) {
  const float a = std::fabs(x), t = 1.0f / __builtin_fmaf(0.3275911f, a, 1.0f);
  float p = 1.061405429f;
  p = __builtin_fmaf(p, t, -1.453152027f);
  p = __builtin_fmaf(p, t, 1.421413741f);
  p = __builtin_fmaf(p, t, -0.284496736f);
  p = __builtin_fmaf(p, t, 0.254829592f);
  return std::copysign(1.0f - p * t * exp_of(-a * a), x);
}

inline float activate(Activation kind, float x) {
  switch (kind) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;  // a NaN stays one
    case Activation::gelu:
      return 0.5f * x * (1.0f + erf_of(x * 0.70710678118654752f));
    case Activation::gelu_tanh:
      return x * sigmoid_of(1.5957691216057308f * __builtin_fmaf(0.044715f * x * x, x, x));
    case Activation::silu:
      return x * sigmoid_of(x);
  }
  return x;
}

template <Activation kind>
inline void activate_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = activate(kind, values[i]);
}

inline void activate_all(Activation kind, float* values, int64_t count) {
  switch (kind) {
    case Activation::none:
      break;
    case Activation::relu:
      activate_all<Activation::relu>(values, count);
      break;
    case Activation::gelu:
      activate_all<Activation::gelu>(values, count);
      break;
    case Activation::gelu_tanh:
      activate_all<Activation::gelu_tanh>(values, count);
      break;
    case Activation::silu:
      activate_all<Activation::silu>(values, count);
      break;
  }
}

// Finish the sums of one row of one panel and store what is real of them; `sums` is scratch from then on.
inline void finish(const Epilogue& e, int64_t n, int64_t row, int64_t panel, float* sums) {
  const int64_t column = panel * kPanel;
  if (e.bias)
    for (int64_t i = 0; i < kPanel; ++i) sums[i] += e.bias[column + i];
  int64_t at = column, width = n - column < kPanel ? n - column : kPanel;
  if (e.gated) {
    at = column / 2, width = width / 2;
    for (int64_t half = 0; half < 2; ++half) {
      float* gates = sums + 32 * half;
      activate_all(e.activation, gates, 16);
      for (int64_t i = 0; i < 16; ++i) sums[16 * half + i] = gates[i] * gates[16 + i];
    }
  } else {
    activate_all(e.activation, sums, kPanel);
  }
  float* y = e.y + row * e.stride + at;
  const float* residual = e.residual ? e.residual + row * e.residual_stride + at : nullptr;
  if (width == kPanel && !residual) {
    std::memcpy(y, sums, kPanel * sizeof(float));
  } else if (residual) {
    for (int64_t i = 0; i < width; ++i) y[i] = residual[i] + sums[i];
  } else {
    for (int64_t i = 0; i < width; ++i) y[i] = sums[i];
  }
}

}  // namespace
}  // namespace pareto
