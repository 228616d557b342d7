"""Damped exponential moving average: the recurrence that MEGA puts before its attention.

X. Ma, C. Zhou, X. Kong, J. He, L. Gui, G. Neubig, J. May, L. Zettlemoyer, "Mega: Moving Average Equipped Gated
Attention", ICLR 2023, https://arxiv.org/abs/2209.10655; Eq. 7.2 of the chapter on TCNCA.

======  ========================  ==============================================================================
symbol  shape                     meaning
======  ========================  ==============================================================================
D, N    –                         width; moving averages per channel (``state_size``)
α, δ    (D, N), (2D, N) both ways  ``sigmoid(alpha_logit)``, ``sigmoid(delta_logit)``: smoothing and damping
β, γ    as α                      expansion of a channel to its N averages, and their projection back
ω       (D,)                      weight of the residual input (D of Eq. 7.2)
q       as α                      1 − αδ, what a step keeps of the state
K       (D, L) or (2D, L)         the kernel, K[d, l] = N^(-½) Σ_n α β γ q^l
======  ========================  ==============================================================================

The output is SiLU(K * x + ω ⊙ x). Four ways lead to it:

- ``fft``: as published. All L taps from their powers, then a product of Fourier transforms: O(L log L).
- ``factored``: the same transforms; the powers q^l come from two tables of √L, so that N·L exponentials become 2·N·√L.
- ``truncated``: only the taps before the slowest q^l falls below ``tolerance``, as a direct convolution: O(L·T).
- :meth:`DampedEMA.step`: the recurrence itself, O(D·N) per token.

``auto`` takes ``truncated`` where T ≤ 16·log2(2L), ``factored`` elsewhere.

Readings: both ways, the second kernel is reversed and shifted by one, so that it sees what follows a token and not the
token itself. Arithmetic is fp32 whatever the module's or the input's dtype (float64 where one of them is float64); the
step keeps its state in float64, since in fp32 a decay of 1e-8 per step is lost in rounding (8e-4 of the largest output
after 65,536 steps). Kernels are never kept between calls: they follow the parameters at once.

Precision: before SiLU, all ways agree with the recurrence in float64 to 1e-5 of Σ_l |K[d, l]| · max |x|, the largest
that a channel's output could be. That is 1e-5 of the largest output itself where products do not cancel. Where they do
(a slow average of an input that alternates), the output is small beside the sum, and fp32 loses as much of it: 4e-3 of
the largest output with logits of deviation 6.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.norm_native import fits
from pareto_sequence.turn_native import turned

Algorithm = Literal["fft", "factored", "truncated", "auto"]

#: ``auto`` truncates up to this many taps per doubling of the length. By the cost per tap of kernels of 11 taps (width
#: 512, length 4k, one core), transforms of 2L break even with about 8 taps of the library's, 26 of the native kernel.
TAPS_PER_DOUBLING = 16
#: Taps of one direct convolution; longer kernels are summed from several. One fp32 sum over 65,536 products would be
#: off by more than 1e-5 of the largest output.
SEGMENT = 1024


@functools.lru_cache(maxsize=256)
def smooth_size(least: int) -> int:
    """Return the smallest 2^a·3^b·5^c that is at least ``least``: a transform's cost jumps at large prime factors."""
    best = 1 << max(0, least - 1).bit_length()
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            twos = threes << max(0, -(-least // threes) - 1).bit_length()
            best = min(best, twos)
            threes *= 3
        fives *= 5
    return best


def fft_convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolve ``x`` (B, D, L) with ``kernel`` (D, L) causally, or with (2D, L) both ways; returns (B, D, L)."""
    width, length = x.shape[1:]
    size = smooth_size(2 * length - 1)
    if len(kernel) == 2 * width:
        ahead = kernel[width:, : length - 1].flip(-1)
        kernel = torch.cat([F.pad(kernel[:width], (0, size - 2 * length + 1)), ahead], -1)
    return torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(kernel, size), size)[..., :length]


def direct_convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """As :func:`fft_convolve`, by the package's depthwise convolution with the T taps of ``kernel`` (D or 2D, T)."""
    width, taps = x.shape[1], kernel.shape[1]
    if len(kernel) == width:
        return _causal(x, kernel)
    both = torch.cat([kernel[width:].flip(-1), kernel[:width]], -1)
    return _causal(F.pad(x, (0, taps)), both)[..., taps:]


def _causal(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    from pareto_sequence.conv import depthwise_conv

    y = depthwise_conv(x, taps[:, :SEGMENT].flip(-1).contiguous())
    for start in range(SEGMENT, min(taps.shape[1], x.shape[-1]), SEGMENT):
        part = depthwise_conv(x[..., :-start].contiguous(), taps[:, start : start + SEGMENT].flip(-1).contiguous())
        y = y + F.pad(part, (start, 0))
    return y


class DampedEMA(nn.Module):
    """SiLU(K * x + ω ⊙ x) with the kernel K of N damped moving averages per channel (see the module's text).

    ``width`` is D, ``state_size`` N; ``bidirectional`` doubles the averages, the second half running backwards.
    ``tolerance`` bounds what ``truncated`` leaves out: at most this share of the sum of each average's taps.
    Raises :class:`ModelError` for sizes below 1, an unknown algorithm, or a tolerance outside (0, 1).
    """

    def __init__(
        self,
        width: int,
        state_size: int = 16,
        *,
        bidirectional: bool = False,
        algorithm: Algorithm = "fft",
        tolerance: float = 1e-7,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("state_size", state_size)):
            if value < 1:
                raise ModelError(f"DampedEMA: {name} = {value}: must be at least 1")
        if algorithm not in get_args(Algorithm):
            raise ModelError(f"DampedEMA: algorithm = {algorithm!r}: one of {', '.join(get_args(Algorithm))}")
        if not 0 < tolerance < 1:
            raise ModelError(f"DampedEMA: tolerance = {tolerance}: must lie between 0 and 1, both excluded")
        self.width, self.state_size, self.bidirectional = width, state_size, bidirectional
        self.algorithm, self.tolerance = algorithm, tolerance
        rows = 2 * width if bidirectional else width
        self.alpha_logit = nn.Parameter(torch.empty(rows, state_size))
        self.delta_logit = nn.Parameter(torch.empty(rows, state_size))
        self.beta = nn.Parameter(torch.empty(rows, state_size))
        self.gamma = nn.Parameter(torch.empty(rows, state_size))
        self.omega = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as MEGA does: β alternates around +1 and −1 from average to average."""
        nn.init.normal_(self.alpha_logit, std=0.2)
        nn.init.normal_(self.delta_logit, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            self.beta[:, 0::2] += 1
            self.beta[:, 1::2] -= 1
        nn.init.normal_(self.gamma)
        nn.init.normal_(self.omega)

    def extra_repr(self) -> str:
        """Show the sizes and the algorithm."""
        ways = ", bidirectional" if self.bidirectional else ""
        return f"{self.width}, {self.state_size}, algorithm={self.algorithm}{ways}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the averages of ``x`` (B, L, D), of its shape and dtype.

        Raises :class:`ModelError` for a length of zero, another width, or integers.
        """
        self._check(x, ("B", "L", "D"))
        with _without_autocast(x.device):
            wide = x.to(torch.promote_types(x.dtype, self._dtype))
            native = fits(wide)
            values = turned(wide) if native else wide.transpose(1, 2).contiguous()
            y = F.silu(self._convolve(values) + self.omega.to(values.dtype)[:, None] * values)
            return (turned(y) if native else y.transpose(1, 2)).to(x.dtype)

    def step(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one token: ``x`` (B, D) and the ``state`` (B, D, N) before it, None at the start.

        Returns y (B, D) in ``x``'s dtype and the next state, in float64. Raises :class:`UnsupportedError` where the
        averages run both ways, :class:`ModelError` for wrong shapes.
        """
        if self.bidirectional:
            raise UnsupportedError("DampedEMA.step: bidirectional averages need the whole sequence; use forward")
        self._check(x, ("B", "D"))
        shape = (len(x), self.width, self.state_size)
        if state is not None and state.shape != shape:
            raise ModelError(f"DampedEMA.step: state is {tuple(state.shape)}, must be {shape}")
        with _without_autocast(x.device):
            alpha, delta = self.alpha_logit.double().sigmoid(), self.delta_logit.double().sigmoid()
            u = x.double()
            # Eq. (7.2)
            state = alpha * self.beta.double() * u[..., None] + (
                0.0 if state is None else (1 - alpha * delta) * state.double()
            )
            y = (self.gamma.double() * state).sum(-1) / math.sqrt(self.state_size) + self.omega.double() * u
        return F.silu(y).to(x.dtype), state

    def kernel(self, length: int) -> torch.Tensor:
        """Return K (D, ``length``), both ways (2D, ``length``), in fp32; every power of q is computed by itself."""
        scale, log_q = self._scale(), self._log_q()
        positions = torch.arange(length, dtype=log_q.dtype, device=log_q.device)
        return torch.einsum("dn,dnl->dl", scale, torch.exp(log_q[..., None] * positions))

    def factored_kernel(self, length: int) -> torch.Tensor:
        """Return :meth:`kernel` by q^(i·b + j) = q^(i·b)·q^j, b about √length: one product of small tables per row."""
        scale, log_q = self._scale(), self._log_q()
        block = math.isqrt(length - 1) + 1 if length > 0 else 1
        positions = torch.arange(block, dtype=log_q.dtype, device=log_q.device)
        coarse = torch.exp(log_q[..., None] * (positions[: -(-length // block)] * block))
        fine = scale[..., None] * torch.exp(log_q[..., None] * positions)
        return torch.matmul(coarse.transpose(1, 2), fine).flatten(1)[:, :length]

    @torch.no_grad()
    def taps(self, length: int) -> int:
        """Return T, the taps up to which the slowest q^l stays above ``tolerance``; at most ``length``.

        Every average then loses at most q^T ≤ ``tolerance`` of the sum of its taps.
        """
        slowest = self._log_q().max().item()
        if not slowest < 0 or math.log(self.tolerance) / slowest >= length:
            return length
        return math.ceil(math.log(self.tolerance) / slowest)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.gamma.dtype, torch.float32)

    def _scale(self) -> torch.Tensor:
        """α β γ N^(-½), the weight of each average at tap 0."""
        alpha = self.alpha_logit.to(self._dtype).sigmoid()
        return alpha * self.beta.to(self._dtype) * self.gamma.to(self._dtype) / math.sqrt(self.state_size)

    def _log_q(self) -> torch.Tensor:
        """log(1 − αδ), finite throughout.

        log1p keeps a decay of 1e-8, which 1 − αδ rounds away. Where αδ rounds to 1, the largest number below 1 stands
        in: log 0 would make tap 0, exp(0 · log 0), and all gradients NaN, and q ≤ 6e-8 is within rounding of 0.
        """
        product = self.alpha_logit.to(self._dtype).sigmoid() * self.delta_logit.to(self._dtype).sigmoid()
        return torch.log1p(-product.clamp(max=1 - torch.finfo(product.dtype).eps / 2))

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-1]
        if self.algorithm == "fft":
            return fft_convolve(x, self.kernel(length).to(x.dtype))
        taps = length if self.algorithm == "factored" else self.taps(length)
        direct = self.algorithm == "truncated" or taps <= TAPS_PER_DOUBLING * math.log2(2 * length)
        if direct and self.algorithm != "factored":
            return direct_convolve(x, self.kernel(taps).to(x.dtype))
        return fft_convolve(x, self.factored_kernel(length).to(x.dtype))

    def _check(self, x: torch.Tensor, axes: tuple[str, ...]) -> None:
        shape = tuple(x.shape)
        if len(shape) != len(axes) or shape[-1] != self.width:
            raise ModelError(f"DampedEMA: input is {shape}, must be ({', '.join(axes)}) with D = {self.width}")
        if len(axes) == 3 and shape[1] == 0:
            raise ModelError(f"DampedEMA: input is {shape}: the length L must be at least 1")
        if not x.is_floating_point():
            raise ModelError(f"DampedEMA: input is of {x.dtype}, must be of a floating-point type")


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast would round the kernel's powers and the state to 8 or 11 bits."""
    if device.type in ("cpu", "cuda"):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
