"""Exchange of positions and channels, (B, L, D) to (B, D, L) and back, by blocks.

A model's layers keep a position's channels together, the convolutions a channel's positions. torch copies such a view
line by line, which where sizes are powers of two leaves the cache several times slower than memory.
"""

from __future__ import annotations

from typing import Any

import torch

from pareto_sequence.conv_native import native, plain, threads_for

# Work per value, in multiplications, of which the number of threads is judged.
COST = 8


def turned(x: torch.Tensor) -> torch.Tensor:
    """Return ``x.transpose(1, 2).contiguous()`` for fp32 of three dimensions on the CPU."""
    return Turn.apply(x)


class Turn(torch.autograd.Function):
    """The exchange; its gradient is the exchange back."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        """See :func:`turned`."""
        x = plain(x)
        out = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
        native().turn(x, out, threads_for(COST * x.numel()))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Nothing is kept: the exchange is linear."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """The gradient with respect to x."""
        return turned(grad)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        """The exchange of the tangent."""
        return turned(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Map by torch, whose copy has no fixed number of dimensions."""
        return x.movedim(in_dims[0], 0).transpose(-1, -2).contiguous(), 0
