"""Temporal convolutional network: the long-range mixer of TCNCA.

Aleksandar Terzić, Michael Hersche, Geethan Karunaratne, Abu Sebastian, Abbas Rahimi: "TCNCA: Temporal CNN with Chunked
Attention for Efficient Training on Long Sequences" (section 7.3 and figure 7.2), https://arxiv.org/abs/2312.05605.

A TCN is a cascade of ``depth`` (the paper's D) residual blocks over x of shape (B, L, width). Block i, counted from 0,
convolves each channel with its own kernel of K taps spread by the dilation F^i, normalises over the channels, applies
SiLU, and adds its input. Decoders pad with zeros on the left, encoders wrap around.

The paper leaves open which norm stands in a block and whether the EMA's term omega * x stays beside the TCN; here
``norm`` is "layer" and ``omega`` off unless stated. Its text counts dilations from 0; they start at F^0 = 1.

A decoder's step costs O(K) per channel and block: each block keeps a ring buffer of its last inputs.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_core.errors import ModelError, UnsupportedError, shown
from pareto_sequence._span import reach_problem
from pareto_sequence.conv import ConvState, Implementation, conv_step, depthwise_conv
from pareto_sequence.norm_native import fits, norm_silu_add
from pareto_sequence.norms import EPSILON, LayerNorm, make_norm
from pareto_sequence.turn_native import turned


def receptive_field(kernel_size: int, dilation_factor: int, depth: int) -> int:
    """Return the number of positions that an output of one TCN depends on: 1 + (K - 1) (F^0 + ... + F^(depth - 1)).

    Raises :class:`ModelError` where an argument is below 1, or a block's dilation or span reaches 2^31.
    """
    _check("kernel_size", kernel_size)
    _check("dilation_factor", dilation_factor)
    _check("depth", depth)
    problem = reach_problem(kernel_size, dilation_factor, depth, "depth")
    if problem:
        raise ModelError(f"dilation_factor = {shown(dilation_factor)}: {problem}")
    return 1 + (kernel_size - 1) * sum(dilation_factor**block for block in range(depth))


class ResidualBlock(nn.Module):
    """One block of a TCN: x + SiLU(norm(conv(x))), the convolution depthwise with K taps, ``dilation`` apart."""

    def __init__(
        self, width: int, kernel_size: int, dilation: int, norm: str, circular: bool, dropout: float, conv: str
    ) -> None:
        super().__init__()
        self.dilation, self.circular, self.implementation = dilation, circular, conv
        self.weight = nn.Parameter(torch.empty(width, kernel_size))
        self.bias = nn.Parameter(torch.empty(width))
        self.norm = make_norm(norm, width)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw taps and bias uniformly from +-1 / sqrt(K), the library's rule for a kernel of K inputs."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @property
    def span(self) -> int:
        """Distance from the first to the last tap, (K - 1) * dilation positions."""
        return (self.weight.shape[1] - 1) * self.dilation

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to the same shape; see :meth:`TCN.forward` for ``mask``."""
        return x + self._activate(self._convolve(x, mask), mask)

    def by_channel(self, x: Tensor) -> Tensor:
        """Map (B, D, L) to the same shape by native kernels; for blocks of which :meth:`goes_by_channel` is true."""
        padding = "circular" if self.circular else "causal"
        y = depthwise_conv(x, self.weight, self.bias, dilation=self.dilation, padding=padding)
        return norm_silu_add(y, x, self.norm.weight, self.norm.bias, EPSILON)

    @property
    def goes_by_channel(self) -> bool:
        """Whether the block is what the native kernels compute: layer norm, and no dropout now."""
        quiet = self.dropout.p == 0.0 or not self.training
        return quiet and isinstance(self.norm, LayerNorm) and self.implementation in ("auto", "native")

    def step(self, x: Tensor, state: ConvState | None) -> tuple[Tensor, ConvState]:
        """Advance by one position: x (B, D) and the ring buffer give y (B, D) and the same buffer, changed."""
        y, state = conv_step(x, state, self.weight, self.bias, self.dilation)
        return x + self._activate(y, None), state

    def _activate(self, y: Tensor, mask: Tensor | None) -> Tensor:
        return self.dropout(F.silu(self.norm(y, mask)))

    def _convolve(self, x: Tensor, mask: Tensor | None) -> Tensor:
        padding = "circular" if self.circular else "causal"
        if mask is not None and self.circular:
            x, padding = self._wrapped(x, mask), "causal"
        elif mask is not None:
            x = x.masked_fill(~mask.bool()[:, :, None], 0.0)
        y = depthwise_conv(
            x.transpose(1, 2),
            self.weight,
            self.bias,
            dilation=self.dilation,
            padding=padding,
            implementation=self.implementation,
        ).transpose(1, 2)
        return y[:, self.span :] if mask is not None and self.circular else y

    def _wrapped(self, x: Tensor, mask: Tensor) -> Tensor:
        """Continue each row circularly at its own length on both sides: (B, L + span, D) for a causal convolution."""
        before = (self.weight.shape[1] - 1) // 2 * self.dilation
        places = torch.arange(x.shape[1] + self.span, device=x.device) - before
        rows = places[None] % mask.long().sum(1).clamp(min=1)[:, None]
        return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


class TCN(nn.Module):
    """Cascade of ``depth`` residual blocks whose dilations are 1, F, F^2, ...; output (B, L, width).

    ``circular`` wraps around (encoding), else the input is padded with zeros on the left (decoding). ``omega`` adds the
    input scaled by a learned number per channel. ``implementation`` is :func:`~pareto_sequence.conv.depthwise_conv`'s.
    Raises :class:`ModelError` for sizes below 1, a dilation beyond 2^31, batch norm in a decoder, or another
    implementation.
    """

    def __init__(
        self,
        width: int,
        kernel_size: int,
        dilation_factor: int,
        depth: int,
        *,
        norm: str = "layer",
        circular: bool = False,
        dropout: float = 0.0,
        omega: bool = False,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        _check("width", width)
        self.receptive_field = receptive_field(kernel_size, dilation_factor, depth)
        if norm == "batch" and not circular:
            raise ModelError("norm = 'batch': a decoder's positions would see later ones; take layer, scale or rms")
        if implementation not in get_args(Implementation):
            known = ", ".join(get_args(Implementation))
            raise ModelError(f"implementation = {shown(implementation)}: expected one of {known}")
        self.width, self.circular = width, circular
        self.blocks = nn.ModuleList(
            ResidualBlock(width, kernel_size, dilation_factor**i, norm, circular, dropout, implementation)
            for i in range(depth)
        )
        self.omega = nn.Parameter(torch.empty(width)) if omega else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw omega from N(0, 1), as the EMA's."""
        if self.omega is not None:
            nn.init.normal_(self.omega)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to (B, L, D).

        ``mask`` (B, L) is nonzero at valid positions. A decoder reads zeros where it is 0. An encoder takes each row to
        be valid from its start to its own length, and wraps around there: outputs at valid positions do not depend on
        the padding. Raises :class:`ModelError` for another width or an empty sequence.
        """
        self._check_input(x, 3)
        y = x
        if mask is None and fits(x) and all(block.goes_by_channel for block in self.blocks):
            y = turned(x)
            for block in self.blocks:
                y = block.by_channel(y)
            y = turned(y)
        else:
            for block in self.blocks:
                y = block(y, mask)
        return y if self.omega is None else y + self.omega * x

    def step(self, x: Tensor, state: tuple[ConvState, ...] | None = None) -> tuple[Tensor, tuple[ConvState, ...]]:
        """Advance a decoder by one position: x (B, D) gives y (B, D), at O(K) per channel and block.

        ``state`` holds one ring buffer per block, which the step changes in place; None is the start, zeros. Raises
        :class:`UnsupportedError` for an encoder, whose first output needs the end of the sequence.
        """
        self._check_input(x, 2)
        y, states = x, []
        for block, buffer in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            y, buffer = block.step(y, buffer)
            states.append(buffer)
        return y if self.omega is None else y + self.omega * x, tuple(states)

    def prefill(self, x: Tensor) -> tuple[Tensor, tuple[ConvState, ...]]:
        """Map (B, L, D) as :meth:`forward` does and return the state after the last position as well."""
        self._check_input(x, 3)
        if self.circular:
            raise UnsupportedError("a circular TCN has no state: an output needs the end of the sequence")
        y, states = x, []
        for block in self.blocks:
            states.append(ConvState.after(y.transpose(1, 2), block.weight.shape[1], block.dilation))
            y = block(y)
        return y if self.omega is None else y + self.omega * x, tuple(states)

    def _check_input(self, x: Tensor, dimensions: int) -> None:
        shape = "(B, L, D)" if dimensions == 3 else "(B, D)"
        if x.ndim != dimensions or x.shape[-1] != self.width:
            raise ModelError(f"x has shape {tuple(x.shape)}: expected {shape} with D = {self.width}")
        if dimensions == 3 and x.shape[1] == 0:
            raise ModelError("x has length 0: a sequence needs at least 1 position")
        if dimensions == 2 and self.circular:
            raise UnsupportedError("a circular TCN cannot step: an output needs the end of the sequence")


def _check(name: str, value: int) -> None:
    if value < 1:
        raise ModelError(f"{name} = {value}: must be at least 1")
