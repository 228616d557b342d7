"""Layer norm over channels, SiLU and the residual of a TCN's block as one operation on (B, D, L), by native kernels.

Rows lie channel after channel, as the convolution leaves them: torch's layer norm would need them turned around twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pareto_sequence.conv_native import native, native_or_none, plain, threads_for

# Work per value, in multiplications, of which the number of threads is judged.
COST = 32


def fits(x: torch.Tensor) -> bool:
    """Whether :func:`norm_silu_add` can stand for torch's operations on ``x``: fp32 on the CPU, and run as written."""
    traced = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and x.dtype == torch.float32 and not traced and native_or_none() is not None


def norm_silu_add(
    c: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return x + SiLU(layer norm of c over its channels): c and x (B, D, L), weight and bias (D), all fp32."""
    return NormSiluAdd.apply(c, x, weight, bias, epsilon)


class NormSiluAdd(torch.autograd.Function):
    """The operation with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, c: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        """See :func:`norm_silu_add`."""
        c, x, weight, bias = plain(c), plain(x), plain(weight), plain(bias)
        out, (mean, rstd) = torch.empty_like(x), x.new_empty(2, x.shape[0], x.shape[2]).unbind()
        native().norm_silu_add(c, x, weight, bias, epsilon, out, mean, rstd, threads_for(COST * x.numel()))
        ctx.save_for_backward(c, weight, bias, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients with respect to c, x, weight and bias."""
        c, weight, bias, mean, rstd = ctx.saved_tensors
        dense = plain(grad)
        c_grad, weight_grad, bias_grad = torch.empty_like(c), torch.empty_like(weight), torch.empty_like(bias)
        native().norm_silu_add_gradient(
            c, dense, weight, bias, mean, rstd, c_grad, weight_grad, bias_grad, threads_for(COST * c.numel())
        )
        return c_grad, grad, weight_grad, bias_grad, None
