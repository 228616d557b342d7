"""Normalisations over the width of sequences (B, L, D), by name: layer, scale, rms, batch.

With x in R^D at one position, g and b learned, eps = 1e-5, all means in float32 whatever the input's dtype:

- ``layer``: g * (x - mean x) / sqrt(var x + eps) + b
- ``rms``: g * x / sqrt(mean x^2 + eps), g in R^D
- ``scale``: the same with a single learned number g (the form that MEGA uses on text)
- ``batch``: each channel by its mean and variance over the batch's valid positions; running figures in evaluation
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_core.errors import ModelError

NORMS = ("layer", "scale", "rms", "batch")
EPSILON = 1e-5


class LayerNorm(nn.Module):
    """Normalises each position over its ``width`` channels by mean and variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (..., D) to the same shape; ``mask`` changes nothing, since no position sees another."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), EPSILON)


class RMSNorm(nn.Module):
    """Normalises each position by the root of its mean square, then scales each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (..., D) to the same shape; ``mask`` changes nothing, since no position sees another."""
        return _by_mean_square(x, self.weight)


class ScaleNorm(nn.Module):
    """Normalises each position by the root of its mean square, then scales all channels by one learned number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (..., D) to the same shape; ``mask`` changes nothing, since no position sees another."""
        return _by_mean_square(x, self.weight)


class BatchNorm(nn.Module):
    """Normalises each channel over all valid positions of the batch; in evaluation by running figures.

    Positions where the mask is 0 neither enter the figures nor are they special in the output. In training every
    position sees every other, hence a causal model refuses this norm. Recomputation (gradient checkpointing) counts a
    batch twice in the running figures.
    """

    def __init__(self, width: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (..., D) to the same shape; ``mask`` (...) is nonzero at valid positions.

        Raises :class:`ModelError` in training where fewer than two positions are valid.
        """
        mean, variance = self._figures(x, mask) if self.training else (self.running_mean, self.running_var)
        wide = _wide(x)
        scale = self.weight.to(wide.dtype) * torch.rsqrt(variance.to(wide.dtype) + EPSILON)
        return ((wide - mean.to(wide.dtype)) * scale + self.bias.to(wide.dtype)).to(x.dtype)

    def _figures(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = _wide((x if mask is None else x[mask.bool()]).reshape(-1, x.shape[-1]))
        if len(rows) < 2:
            raise ModelError(f"batch norm trains on at least 2 valid positions, here are {len(rows)}")
        variance, mean = torch.var_mean(rows, 0, correction=0)
        with torch.no_grad():
            unbiased = variance * (len(rows) / (len(rows) - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, variance


def make_norm(name: str, width: int) -> nn.Module:
    """Return a fresh norm of ``width`` channels; its ``forward(x, mask=None)`` keeps the shape (..., D).

    Raises :class:`ModelError` for a name not in :data:`NORMS` or a width below 1.
    """
    kinds = {"layer": LayerNorm, "scale": ScaleNorm, "rms": RMSNorm, "batch": BatchNorm}
    if name not in kinds:
        raise ModelError(f"norm = {name!r}: expected one of {', '.join(NORMS)}")
    if width < 1:
        raise ModelError(f"width = {width}: a norm needs at least 1 channel")
    return kinds[name](width)


def _by_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * weight.to(wide.dtype)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least single precision, in which means and squares are taken."""
    return x if x.dtype == torch.float64 else x.float()
