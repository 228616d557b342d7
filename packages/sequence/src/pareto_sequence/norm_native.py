"""Layer norm over channels, SiLU and the residual of a TCN's block as one operation on (B, D, L), by native kernels.

Rows lie channel after channel, as the convolution leaves them: torch's layer norm would need them turned around twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

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
    out, _, _ = NormSiluAdd.apply(c, x, weight, bias, epsilon)
    return out


class NormSiluAdd(torch.autograd.Function):
    """The operation with its gradients; those that are to be differentiated again are made of torch's operations."""

    @staticmethod
    def forward(
        c: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :func:`norm_silu_add`; beside it the means and reciprocal deviations (B, L), for the gradient."""
        c, x, weight, bias = plain(c), plain(x), plain(weight), plain(bias)
        out, (mean, rstd) = torch.empty_like(x), x.new_empty(2, x.shape[0], x.shape[2]).unbind()
        native().norm_silu_add(c, x, weight, bias, epsilon, out, mean, rstd, threads_for(COST * x.numel()))
        return out, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep what is normalised, how, and its figures."""
        c, _, weight, bias, ctx.epsilon = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(c, weight, bias, mean, rstd)
        ctx.save_for_forward(c, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Gradients with respect to c, x, weight and bias."""
        c, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            c_grad, weight_grad, bias_grad = torch_gradients(c, weight, bias, ctx.epsilon, grad)
            return c_grad, grad, weight_grad, bias_grad, None
        c, dense, weight, bias = plain(c), plain(grad), plain(weight), plain(bias)
        c_grad, weight_grad, bias_grad = torch.empty_like(c), torch.empty_like(weight), torch.empty_like(bias)
        native().norm_silu_add_gradient(
            c, dense, weight, bias, mean, rstd, c_grad, weight_grad, bias_grad, threads_for(COST * c.numel())
        )
        return c_grad, grad, weight_grad, bias_grad, None

    @staticmethod
    def jvp(
        ctx: Any, c: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: None
    ) -> tuple[torch.Tensor, None, None]:
        """The change of the output for changes of c, x, weight and bias."""
        at, scale, shift = ctx.saved_tensors[:3]
        normed, rstd = normalised(at, ctx.epsilon)
        change = rstd * (c - c.mean(1, keepdim=True) - normed * (normed * c).mean(1, keepdim=True))
        slope = silu_slope(scale[:, None] * normed + shift[:, None])
        return x + slope * (change * scale[:, None] + normed * weight[:, None] + bias[:, None]), None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        c: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        epsilon: float,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        """Map the same by torch's operations: which arguments are mapped decides how channels lie in memory."""

        def run(
            c: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            normed, rstd = normalised(c, epsilon)
            return x + F.silu(weight[:, None] * normed + bias[:, None]), c.mean(1), rstd[:, 0]

        return torch.func.vmap(run, in_dims=in_dims[:4])(c, x, weight, bias), (0, 0, 0)


def normalised(c: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """c (B, D, L) less its mean over channels and over its deviation, and the reciprocal of that (B, 1, L)."""
    variance, mean = torch.var_mean(c, 1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + epsilon)
    return (c - mean) * rstd, rstd


def silu_slope(n: torch.Tensor) -> torch.Tensor:
    """The derivative of SiLU at ``n``."""
    gate = n.sigmoid()
    return gate * (1 + n * (1 - gate))


def torch_gradients(
    c: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to c (B, D, L), weight and bias (D), themselves differentiable."""
    normed, rstd = normalised(c, epsilon)
    before = grad * silu_slope(weight[:, None] * normed + bias[:, None])
    inner = before * weight[:, None]
    c_grad = rstd * (inner - inner.mean(1, keepdim=True) - normed * (inner * normed).mean(1, keepdim=True))
    return c_grad, (before * normed).sum((0, 2)), before.sum((0, 2))
