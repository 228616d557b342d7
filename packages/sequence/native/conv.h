// Depthwise dilated convolution of rows in fp32, and its gradients.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "walk.h"

namespace pareto {

// Rows of `width` channels each for `batch` sequences, channel after channel: x is (batch, width, length).
struct Rows {
  int64_t batch, width;
};

// y[b, d, t] = bias[d] + sum over k of weight[d, k] * x[b, d, t + offset k]; a null bias is 0. With a mirrored geometry
// and the gradient of y in place of x, this is the gradient with respect to x.
void convolve(const Kernels& kernels, const Geometry& geometry, Rows rows, const float* x, const float* weight,
              const float* bias, float* y, int threads);

// weight_grad[d, k] = sum over b and t of grad[b, d, t] * x[b, d, t + offset k], bias_grad[d] the sum of grad (not
// taken where null). The same to the bit for any number of threads.
void weight_gradient(const Kernels& kernels, const Geometry& geometry, Rows rows, const float* x, const float* grad,
                     float* weight_grad, float* bias_grad, int threads);

}  // namespace pareto
