"""Depthwise dilated convolution by this package's kernels for CPUs.

The kernels keep 64 outputs of a row in registers while they go over all taps, reading the row itself rather than a
padded copy of it. The gradient with respect to the input is the same convolution mirrored; those with respect to weight
and bias are inner products, summed in an order that does not depend on the number of threads. Gradients that are to be
differentiated again leave the kernels, see ``conv_gradients``.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.conv_gradients import KernelConv

# Multiplications below which another thread costs more to wake than it saves.
MULTIPLICATIONS_PER_THREAD = 2**17


@functools.cache
def native_or_none() -> Any:
    """The compiled module, or None where the package was installed without it."""
    try:
        return importlib.import_module("pareto_sequence._native")
    except ImportError:
        return None


def native() -> Any:
    """The compiled module. Raises :class:`UnsupportedError` where the package was installed without it."""
    module = native_or_none()
    if module is None:
        raise UnsupportedError(
            "the native convolution cannot be loaded: install the package rather than its sources, or use "
            "implementation='auto'"
        )
    return module


def native_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, padding: str
) -> torch.Tensor:
    """Convolve as ``pareto_sequence.conv.depthwise_conv`` does; arguments as there, their shapes not checked.

    bf16 and fp16 are computed through fp32. Raises :class:`UnsupportedError` for other devices, or without the native
    module, and :class:`ModelError` for fp64, which the kernels do not compute.
    """
    native()
    if x.device.type != "cpu":
        raise UnsupportedError(f"implementation 'native' runs on the CPU; x is on {x.device}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"x has dtype {x.dtype}; implementation 'native' takes float32, bfloat16 or float16")
    return NativeConv.apply(x, weight, bias, dilation, padding)


class NativeConv(KernelConv):
    """The native convolution with its gradients."""

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, padding: str
    ) -> torch.Tensor:
        """See :func:`native_conv`."""
        return convolve(x, weight, bias, dilation=dilation, circular=padding == "circular").to(x.dtype)

    @staticmethod
    def kernel_gradients(ctx: Any, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> tuple[Any, ...]:
        """Gradients with respect to x, weight and bias, where they are asked for."""
        geometry = {"dilation": ctx.dilation, "circular": ctx.padding == "circular"}
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = plain(grad)
        x_grad = convolve(grad, weight, None, mirrored=True, **geometry).to(x.dtype) if needs_x else None
        weight_grad = bias_grad = None
        if needs_weight:
            weight_grad, bias_grad = weight_gradient(x, grad, weight.shape[1], with_bias=needs_bias, **geometry)
            weight_grad = weight_grad.to(weight.dtype)
        elif needs_bias:
            bias_grad = grad.sum((0, 2))
        return x_grad, weight_grad, bias_grad if bias_grad is None else bias_grad.to(weight.dtype)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dilation: int,
    circular: bool,
    mirrored: bool = False,
    threads: int | None = None,
    isa: str = "",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve (B, D, L) in fp32, into ``out`` where given; ``mirrored`` is the transpose, each tap read backwards."""
    x, weight = plain(x), plain(weight)
    if out is None:
        out = x.new_empty(x.shape)
    bias = None if bias is None else plain(bias)
    threads = threads or threads_for(x.numel() * weight.shape[1])
    native().convolve(x, weight, bias, out, dilation, circular, mirrored, threads, isa)
    return out


def weight_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: int,
    *,
    dilation: int,
    circular: bool,
    with_bias: bool,
    threads: int | None = None,
    isa: str = "",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients (D, K) and (D), in fp32, for inputs and gradients (B, D, L)."""
    x, grad = plain(x), plain(grad)
    weight_grad = x.new_empty(x.shape[1], kernel_size)
    bias_grad = x.new_empty(x.shape[1]) if with_bias else None
    threads = threads or threads_for(x.numel() * kernel_size)
    native().weight_gradient(x, grad, weight_grad, bias_grad, dilation, circular, threads, isa)
    return weight_grad, bias_grad


def plain(x: torch.Tensor) -> torch.Tensor:
    """What the native module takes: contiguous fp32 outside the graph."""
    return x.detach().to(torch.float32).contiguous()


def threads_for(multiplications: int) -> int:
    """As many threads as torch uses, if there are CPUs for them and the work is worth it."""
    wanted = max(1, multiplications // MULTIPLICATIONS_PER_THREAD)
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)), wanted)
