"""What the convolution's kernels have in common as a function of torch: gradients of gradients, vmap and jvp.

Kernels are not part of a graph. A gradient that is to be differentiated itself (``create_graph``, every gradient under
``torch.func``) is therefore computed by torch's operations, which cost more; an ordinary backward pass by the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight

from pareto_sequence.conv import Padding, library_conv, padded_for_library


class KernelConv(torch.autograd.Function):
    """Base of the convolutions by kernels: a subclass defines ``forward`` and :meth:`kernel_gradients`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep x, the weight, and how they are convolved."""
        x, weight, _, ctx.dilation, ctx.padding = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def kernel_gradients(ctx: Any, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> tuple[Any, ...]:
        """Gradients with respect to x, weight and bias where ``ctx.needs_input_grad``, outside the graph."""
        raise TypeError("a convolution by kernels must define kernel_gradients(ctx, x, weight, grad)")

    @classmethod
    def backward(cls, ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Gradients with respect to x, weight and bias, where they are asked for."""
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = library_gradients(x, weight, grad, ctx.dilation, ctx.padding, ctx.needs_input_grad)
        else:
            found = cls.kernel_gradients(ctx, x, weight, grad)
        return *found, None, None

    @staticmethod
    def jvp(
        ctx: Any, x_tangent: torch.Tensor, weight_tangent: torch.Tensor, bias_tangent: torch.Tensor | None, *_: None
    ) -> torch.Tensor:
        """The convolution is linear in x and in weight and bias."""
        x, weight = ctx.saved_tensors
        by_x = library_conv(x_tangent, weight, None, ctx.dilation, ctx.padding)
        return by_x + library_conv(x, weight_tangent, bias_tangent, ctx.dilation, ctx.padding)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dilation: int,
        padding: Padding,
    ) -> tuple[torch.Tensor, int]:
        """Map torch's convolution: which arguments are mapped decides how channels lie in memory."""

        def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return library_conv(x, weight, bias, dilation, padding)

        return torch.func.vmap(run, in_dims=in_dims[:3])(x, weight, bias), 0


def library_gradients(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, dilation: int, padding: Padding, needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients with respect to x (B, D, L), weight (D, K) and bias (D), where ``needed``; themselves differentiable.

    Read backwards, the gradient of the input is the convolution of the gradient read backwards, for either padding.
    """
    x_grad = weight_grad = bias_grad = None
    if needed[0]:
        x_grad = library_conv(grad.flip(-1), weight, None, dilation, padding).flip(-1)
    if needed[1]:
        padded, taps, step = padded_for_library(x, weight.shape[1], dilation, padding)
        size = (len(weight), 1, taps)
        weight_grad = conv1d_weight(padded, size, grad, dilation=step, groups=len(weight))[:, 0]
        weight_grad = F.pad(weight_grad, (weight.shape[1] - taps, 0))  # taps that read padding alone
    if needed[2]:
        bias_grad = grad.sum((0, 2))
    return x_grad, weight_grad, bias_grad
