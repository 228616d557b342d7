"""Depthwise dilated convolution by Triton kernels for GPUs.

Imported when it is asked for, since Triton need not be installed. Where a tap reads is given to the kernels as a table
of offsets, so that one kernel serves both paddings and, with the offsets negated, the gradient with respect to the
input. The gradient with respect to the weight is summed in parts of a fixed size, and those by torch, so that it is the
same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.conv_gradients import KernelConv

# Positions are counted in 32 bits, and a position and an offset are added.
LONGEST = 2**30
# Positions that one program of the forward kernel computes, and those that one takes at a time for the weight.
BLOCK = 512
WEIGHT_BLOCK = 128
# Taps that one program sums the weight's gradient for.
MOST_TAPS = 16
# Programs that the weight's gradient is shared out to, where there is work for so many.
WEIGHT_PROGRAMS = 2048


def triton_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, padding: str
) -> torch.Tensor:
    """Convolve as ``pareto_sequence.conv.depthwise_conv`` does; arguments as there, their shapes not checked.

    Sums are in fp32 for fp32, bf16 and fp16. Raises :class:`UnsupportedError` for tensors that are not on a GPU (but
    where Triton's interpreter is on) and :class:`ModelError` for other dtypes.
    """
    interpreted = not isinstance(_conv_kernel, triton.JITFunction)
    if x.device.type != "cuda" and not interpreted:
        raise UnsupportedError(f"implementation 'triton' runs on a GPU; x is on {x.device}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"x has dtype {x.dtype}; implementation 'triton' takes float32, bfloat16 or float16")
    if x.shape[2] > LONGEST:
        raise ModelError(f"x has length {x.shape[2]}; implementation 'triton' takes at most {LONGEST}")
    return TritonConv.apply(x, weight, bias, dilation, padding)


class TritonConv(KernelConv):
    """The convolution on a GPU with its gradients."""

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, padding: str
    ) -> torch.Tensor:
        """See :func:`triton_conv`."""
        circular = padding == "circular"
        first, offsets = tap_offsets(x, weight.shape[1], dilation, circular, mirrored=False)
        return _convolve(x, weight, bias, first, offsets, circular)

    @staticmethod
    def kernel_gradients(ctx: Any, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> tuple[Any, ...]:
        """Gradients with respect to x, weight and bias, where they are asked for."""
        circular = ctx.padding == "circular"
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            first, offsets = tap_offsets(x, weight.shape[1], ctx.dilation, circular, mirrored=True)
            x_grad = _convolve(grad, weight, None, first, offsets, circular)
        if ctx.needs_input_grad[1]:
            first, offsets = tap_offsets(x, weight.shape[1], ctx.dilation, circular, mirrored=False)
            weight_grad = torch.zeros_like(weight)
            weight_grad[:, first:] = _weight_gradient(x, grad, offsets, circular)
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum((0, 2), dtype=torch.float32).to(weight.dtype)
        return x_grad, weight_grad, bias_grad


def tap_offsets(
    x: torch.Tensor, taps: int, dilation: int, circular: bool, *, mirrored: bool
) -> tuple[int, torch.Tensor]:
    """The first tap that reads more than padding, and for each from there what it adds to the position, int32.

    Circular offsets are in [0, L), so that a position and an offset wrap once at most.
    """
    length = x.shape[-1]
    sign = -1 if mirrored else 1
    if circular:
        centre = (taps - 1) // 2
        return 0, torch.tensor(
            [sign * (k - centre) * dilation % length for k in range(taps)], dtype=torch.int32, device=x.device
        )
    first = taps - min(taps, (length - 1) // dilation + 1)
    delays = [sign * (k - (taps - 1)) * dilation for k in range(first, taps)]
    return first, torch.tensor(delays, dtype=torch.int32, device=x.device)


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, first: int, offsets: torch.Tensor, circular: bool
) -> torch.Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    batch, width, length = x.shape
    y = torch.empty_like(x)
    blocks = triton.cdiv(length, BLOCK)
    with torch.cuda.device_of(x):
        _conv_kernel[(batch * width * blocks,)](
            x, weight, x if bias is None else bias.contiguous(), offsets, y, width, length, blocks, weight.shape[1],
            first, HAS_BIAS=bias is not None, TAPS=len(offsets), CIRCULAR=circular, BLOCK=BLOCK,
        )  # fmt: skip
    return y


def _weight_gradient(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor, circular: bool) -> torch.Tensor:
    """(D, len(offsets)) in fp32: parts summed by programs, and the parts by torch."""
    x, grad = x.contiguous(), grad.contiguous()
    batch, width, length = x.shape
    taps = len(offsets)
    groups = triton.cdiv(taps, MOST_TAPS)
    items = batch * triton.cdiv(length, WEIGHT_BLOCK)
    parts = min(items, max(1, WEIGHT_PROGRAMS // (width * groups)))
    partial = torch.empty(parts, width, taps, device=x.device)
    with torch.cuda.device_of(x):
        _weight_kernel[(width * parts, groups)](
            x, grad, offsets, partial, width, length, parts, items, triton.cdiv(items, parts), taps,
            GROUP=min(MOST_TAPS, triton.next_power_of_2(taps)), CIRCULAR=circular, BLOCK=WEIGHT_BLOCK,
        )  # fmt: skip
    return partial.sum(0)


@triton.jit
def _conv_kernel(
    x, weight, bias, offsets, y, width, length, blocks, stride, first,
    HAS_BIAS: tl.constexpr, TAPS: tl.constexpr, CIRCULAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one block of one row; ``stride`` is the number of taps of the weight, of which ``first`` are left out."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    t = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = t < length
    channel = row % width
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    for k in range(TAPS):
        source = t + tl.load(offsets + k)
        if CIRCULAR:
            source = tl.where(source >= length, source - length, source)
            reads = inside
        else:
            reads = inside & (source >= 0) & (source < length)
        w = tl.load(weight + channel * stride + first + k).to(tl.float32)
        total += w * tl.load(x + row * length + source, mask=reads, other=0.0).to(tl.float32)
    tl.store(y + row * length + t, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weight_kernel(
    x, grad, offsets, partial, width, length, parts, items, items_per_part, taps,
    GROUP: tl.constexpr, CIRCULAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum one channel's products for one group of taps over one part of the blocks of all sequences."""
    part = tl.program_id(0) % parts
    channel = (tl.program_id(0) // parts).to(tl.int64)
    k = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    offset = tl.load(offsets + k, mask=k < taps, other=0)
    blocks = (length + BLOCK - 1) // BLOCK
    total = tl.zeros((GROUP, BLOCK), tl.float32)
    for item in range(part * items_per_part, tl.minimum((part + 1) * items_per_part, items)):
        row = (item // blocks).to(tl.int64) * width + channel
        t = (item % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = t < length
        g = tl.load(grad + row * length + t, mask=inside, other=0.0).to(tl.float32)
        source = t[None, :] + offset[:, None]
        reads = inside[None, :] & (k < taps)[:, None]
        if CIRCULAR:
            source = tl.where(source >= length, source - length, source)
        else:
            reads = reads & (source >= 0) & (source < length)
        total += g[None, :] * tl.load(x + row * length + source, mask=reads, other=0.0).to(tl.float32)
    tl.store(partial + (part * width + channel) * taps + k, tl.sum(total, axis=1), mask=k < taps)
