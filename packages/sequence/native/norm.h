// y = x + SiLU(layer norm of c over the channels), what stands around a residual block's convolution, and its
// gradients. c, x and y are (batch, width, length), channel after channel, in fp32.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace pareto {

struct NormShape {
  int64_t batch, width, length;
};

// mean and rstd (batch, length) are kept for the gradients.
void norm_silu_add(const Kernels& kernels, NormShape shape, const float* c, const float* x, const float* weight,
                   const float* bias, float epsilon, float* y, float* mean, float* rstd, int threads);

// c_grad from the gradient of y; weight_grad and bias_grad (width), the same to the bit for any number of threads.
void norm_silu_add_gradient(const Kernels& kernels, NormShape shape, const float* c, const float* grad,
                            const float* weight, const float* bias, const float* mean, const float* rstd, float* c_grad,
                            float* weight_grad, float* bias_grad, int threads);

}  // namespace pareto
