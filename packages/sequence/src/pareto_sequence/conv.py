"""Depthwise dilated convolution of sequences, on whichever implementation suits the device and the numbers.

x is (B, D, L): batch, channels, positions; the weight is (D, K), one filter of K taps for each channel. Filters are not
flipped, as in torch's conv1d. With c the tap that reads the position itself,

    y[b, d, t] = bias[d] + sum over k of weight[d, k] * x[b, d, t + (k - c) * dilation],

- ``padding="causal"``: c = K - 1, so that nothing after t is read; before the first position x is 0;
- ``padding="circular"``: c = (K - 1) // 2; positions count modulo L.

A filter that spans more than the sequence is defined by the same formula: taps that read zeros alone add nothing, and
circular positions wrap as often as they must.

Implementations, each beside the first:

- ``reference``: the formula, one shifted product for each tap, in any dtype on any device;
- ``library``: ``torch.nn.functional.conv1d`` on a padded copy;
- ``native``: this package's kernels for CPUs, see ``conv_native``;
- ``triton``: this package's kernels for GPUs, see ``conv_triton``;
- ``auto``: one of these, see :func:`choose`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from pareto_core.errors import ModelError, UnsupportedError, shown
from pareto_sequence._span import SPAN_LIMIT

Padding = Literal["causal", "circular"]
Implementation = Literal["auto", "reference", "library", "native", "triton"]

# Rows that a ring of past inputs begins with where its span is longer; it doubles as inputs come.
FIRST_ROWS = 256


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dilation: int = 1,
    padding: Padding = "causal",
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Convolve each channel of ``x`` (B, D, L) with its filter in ``weight`` (D, K); returns (B, D, L).

    Differentiable in ``x``, ``weight`` and ``bias`` (D) as often as asked, and by ``torch.func``; a gradient that is to
    be differentiated again is computed as ``library`` does. Under autocast, arguments are cast as torch's own
    convolution casts them.

    Raises :class:`ModelError` for shapes, dtypes, devices or a dilation that do not fit, and
    :class:`UnsupportedError` where the implementation asked for cannot run here.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias, dilation, padding, implementation)
    if x.numel() == 0:
        return x + weight.sum() + (0 if bias is None else bias.sum())  # empty, and part of the graph
    if implementation == "auto":
        implementation = choose(x, weight)
    if implementation == "native":
        from pareto_sequence.conv_native import native_conv

        return native_conv(x, weight, bias, dilation, padding)
    if implementation == "triton":
        return _triton_conv()(x, weight, bias, dilation, padding)
    run = reference_conv if implementation == "reference" else library_conv
    return run(x, weight, bias, dilation, padding)


def _triton_conv() -> Callable[..., torch.Tensor]:
    try:
        from pareto_sequence.conv_triton import triton_conv
    except ImportError as error:
        raise UnsupportedError(f"implementation 'triton' needs Triton, which cannot be loaded: {error}") from error
    return triton_conv


def choose(x: torch.Tensor, weight: torch.Tensor) -> Implementation:
    """Say what ``auto`` means for these arguments: ``native`` for fp32 on the CPU, else ``library``.

    The native kernels make no padded copy, and their gradients cost what the forward pass does. They compute in fp32,
    so that other dtypes keep the library; so do code that torch compiles and an installation without the native module.
    On a GPU ``triton`` is to be asked for by name.
    """
    from pareto_sequence.conv_native import native_or_none

    plain = x.device.type == "cpu" and x.dtype == torch.float32 and weight.dtype == torch.float32
    if plain and not torch.compiler.is_compiling() and native_or_none() is not None:
        return "native"
    return "library"


def reference_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, padding: Padding
) -> torch.Tensor:
    """Sum the shifted products, tap by tap. Arguments as in :func:`depthwise_conv`, not checked."""
    length, taps = x.shape[-1], weight.shape[1]
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
    for k in range(taps):
        if padding == "circular":
            shifted = torch.roll(x, -((k - (taps - 1) // 2) * dilation) % length, dims=-1)
        else:
            delay = (taps - 1 - k) * dilation
            if delay >= length:
                continue
            shifted = F.pad(x[..., : length - delay], (delay, 0))
        y = y + weight[:, k, None] * shifted
    return y


def library_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, padding: Padding
) -> torch.Tensor:
    """Pad, then convolve by torch. Arguments as in :func:`depthwise_conv`, not checked."""
    padded, taps, dilation = padded_for_library(x, weight.shape[1], dilation, padding)
    return F.conv1d(padded, weight[:, None, -taps:], bias, dilation=dilation, groups=x.shape[1])


def padded_for_library(x: torch.Tensor, taps: int, dilation: int, padding: Padding) -> tuple[torch.Tensor, int, int]:
    """``x`` padded, how many taps (the last ones) convolve it, and their dilation on it."""
    if padding == "circular":
        padded, dilation = _wrapped(x, taps, dilation)
        return padded, taps, dilation
    taps = reaching_taps(x.shape[-1], taps, dilation)
    return F.pad(x, ((taps - 1) * dilation, 0)), taps, dilation


def reaching_taps(length: int, taps: int, dilation: int) -> int:
    """How many taps, the last ones, of a causal filter read anything but padding."""
    return min(taps, (length - 1) // dilation + 1)


def _wrapped(x: torch.Tensor, taps: int, dilation: int) -> tuple[torch.Tensor, int]:
    """``x`` with its ends continued circularly for that filter, and a dilation that means the same modulo L."""
    length = x.shape[-1]
    if dilation > length:
        dilation = dilation % length or length
    before = (taps - 1) // 2 * dilation
    after = (taps - 1) * dilation - before
    if max(before, after) <= length:
        return F.pad(x, (before, after), mode="circular"), dilation
    return x[..., torch.arange(-before, length + after, device=x.device) % length], dilation


@dataclass(kw_only=True)
class ConvState:
    """The inputs that a causal convolution still needs, in a ring.

    ``ring`` is (rows, B, D); the next input goes to row ``position``. It grows with the inputs up to ``span`` + 1 rows,
    span = (K - 1) * dilation, and turns around from then on: a long filter costs no memory before there is text.
    """

    ring: torch.Tensor
    span: int
    position: int = 0

    @classmethod
    def empty(cls, x: torch.Tensor, kernel_size: int, dilation: int) -> ConvState:
        """Begin before any input, for steps of the shape, dtype and device of ``x`` (B, D)."""
        span = (kernel_size - 1) * dilation
        return cls(ring=x.new_zeros(min(span + 1, FIRST_ROWS), *x.shape), span=span)

    @classmethod
    @torch.no_grad()
    def after(cls, x: torch.Tensor, kernel_size: int, dilation: int) -> ConvState:
        """Go on after the inputs ``x`` (B, D, L), which were convolved at once. They are copied, outside the graph."""
        state = cls.empty(x[..., 0], kernel_size, dilation)
        last = x[..., -(state.span + 1) :].permute(2, 0, 1)
        state.make_room(len(last))
        state.ring[: len(last)] = last
        state.position = len(last) % (state.span + 1)
        return state

    def make_room(self, rows: int) -> None:
        """Have at least ``rows`` rows, and no more than the span asks: the ring grows at least twofold, by zeros."""
        held = len(self.ring)
        if rows > held:
            ring = self.ring.new_zeros(min(max(rows, 2 * held), self.span + 1), *self.ring.shape[1:])
            ring[:held] = self.ring
            self.ring = ring

    def select(self, index: torch.Tensor) -> ConvState:
        """Keep the sequences that ``index`` (B',) names, as a beam search does; the ring is copied."""
        return ConvState(ring=self.ring.index_select(1, index), span=self.span, position=self.position)


@torch.no_grad()
def conv_step(
    x: torch.Tensor,
    state: ConvState | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dilation: int = 1,
) -> tuple[torch.Tensor, ConvState]:
    """Take one position ``x`` (B, D) further through a causal convolution, in O(K) for each channel.

    Returns y (B, D) and the state for the next position, which is ``state`` itself, changed in place; None begins a
    sequence. No gradient is recorded. Sums are taken in fp32 at least.

    Raises :class:`ModelError` where shapes do not fit, or the state belongs to another convolution or batch.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise ModelError(f"x has shape {tuple(x.shape)}; one step must be (batch, width), neither of them 0")
    _check(x[..., None], weight, bias, dilation, "causal", "auto")
    taps = weight.shape[1]
    if state is None:
        state = ConvState.empty(x, taps, dilation)
    span = (taps - 1) * dilation
    if state.span != span or state.ring.shape[1:] != x.shape:
        raise ModelError(
            f"state.ring is for a span of {state.span} and inputs of shape {tuple(state.ring.shape[1:])}; kernel size "
            f"{taps}, dilation {dilation} and x of shape {tuple(x.shape)} need {span} and {tuple(x.shape)}"
        )
    state.make_room(state.position + 1)
    now = state.position
    state.ring[now] = x
    state.position = (now + 1) % (span + 1)
    if len(state.ring) <= span:
        taps = min(taps, now // dilation + 1)  # earlier inputs, which the other taps would read, are zeros
    read = (now - dilation * torch.arange(taps - 1, -1, -1, device=x.device)) % (span + 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (state.ring[read].to(dtype) * weight[:, -taps:].t()[:, None, :].to(dtype)).sum(0)
    return (y if bias is None else y + bias).to(x.dtype), state


def _autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    device = x.device.type
    known = torch.amp.is_autocast_available(device)
    if not known or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, padding: str, implementation: str
) -> None:
    _check_shapes(x, weight, bias)
    if isinstance(dilation, bool) or not isinstance(dilation, int) or dilation < 1:
        raise ModelError(f"dilation = {shown(dilation)}: a whole number of at least 1")
    span = (weight.shape[1] - 1) * dilation
    if max(span, dilation) >= SPAN_LIMIT:
        raise ModelError(
            f"kernel size {weight.shape[1]} with dilation {shown(dilation)} spans {shown(span)} positions: at most "
            "2^31 - 1"
        )
    for name, value, known in (
        ("padding", padding, get_args(Padding)),
        ("implementation", implementation, get_args(Implementation)),
    ):
        if value not in known:
            raise ModelError(f"{name} = {shown(value)}: one of {', '.join(known)}")


def _check_shapes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.ndim != 3 or x.shape[2] == 0:
        raise ModelError(f"x has shape {tuple(x.shape)}; (batch, width, length) with a length of at least 1")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise ModelError(
            f"weight has shape {tuple(weight.shape)}; (width {x.shape[1]}, kernel size of at least 1) for this x"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ModelError(f"bias has shape {tuple(bias.shape)}; (width {x.shape[1]},) or none")
    if not x.dtype.is_floating_point:
        raise ModelError(f"x has dtype {x.dtype}; a real floating-point dtype")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise ModelError(f"{name} is {other.dtype} on {other.device}; {x.dtype} on {x.device} as x is")
