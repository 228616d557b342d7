"""The grid of a quantised matrix: scales and zero points per group, codes, and what they stand for.

A weight is ``multiplier * scale * (code - zero)``: ``scale`` is fp16 and ``multiplier`` a power of two, both fixed
before codes are chosen, so that what a search saw is exactly what the packed file holds.

Symmetric grids put the extreme value of a group on the lowest code, whatever its sign (the scale then has the other
sign): all 2^bits codes are used, and the extreme is represented exactly but for the scale's rounding. Codes are
unsigned: the zero of a symmetric weight is 8 in stores of 4 bits (which hold 3-bit codes too, -4 … 3 becoming 4 … 11),
128 in stores of 8.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from pareto_core.errors import ModelError

#: scales of a matrix are stored as multiples of this where they fit: matrices that share it are fused as they are
USUAL_MULTIPLIER = 2.0**-8
#: the largest scale over its multiplier lies between these: far from fp16's ends, whose products with codes fit as well
_LOWEST, _HIGHEST = 2.0**-6, 2.0**7
_FP16_MAX = 65504.0


def store_bits(bits: int) -> int:
    """Return the bits that a code takes in the packed format: 4 for 3 and 4, 8 for 8."""
    return 4 if bits <= 4 else 8


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the lowest and the highest code."""
    if not symmetric:
        return 0, 2**bits - 1
    middle = 2 ** (store_bits(bits) - 1)
    return middle - 2 ** (bits - 1), middle + 2 ** (bits - 1) - 1


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scales fp32 (n, groups), already rounded as they are stored; zeros fp32 (n, groups), the middle if symmetric."""

    scales: torch.Tensor
    zeros: torch.Tensor
    multiplier: float
    group: int
    bits: int
    symmetric: bool

    @property
    def stored_scales(self) -> torch.Tensor:
        """Scales fp16 (n, groups) as the file holds them."""
        return (self.scales / self.multiplier).half()

    @property
    def stored_zeros(self) -> torch.Tensor | None:
        """Zeros uint8 (n, groups), None where symmetric."""
        return None if self.symmetric else self.zeros.to(torch.uint8)

    def real_codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the position of ``weight`` (n, k) on the grid, neither rounded nor clipped."""
        n, k = weight.shape
        steps = weight.float().reshape(n, k // self.group, self.group) / nonzero(self.scales)[..., None]
        return (steps + self.zeros[..., None]).view(n, k)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes fp32 (n, k)."""
        codes = self.real_codes(weight).round_().clamp_(*code_range(self.bits, self.symmetric))
        zero_scale = (self.scales == 0).repeat_interleave(self.group, 1)
        return torch.where(zero_scale, self.zeros.repeat_interleave(self.group, 1), codes)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights fp32 (n, k) that ``codes`` stand for."""
        n, k = codes.shape
        steps = codes.float().view(n, k // self.group, self.group) - self.zeros[..., None]
        return (steps * self.scales[..., None]).view(n, k)

    def columns(self, first: int, last: int) -> Grid:
        """Return the grid of the inputs ``first`` to ``last`` (whole groups)."""
        groups = slice(first // self.group, last // self.group)
        return dataclasses.replace(self, scales=self.scales[:, groups], zeros=self.zeros[:, groups])


def group_extremes(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and highest weight of each group, 0 included, fp32 (n, groups)."""
    n, k = weight.shape
    grouped = weight.float().reshape(n, k // group, group)
    return grouped.amin(2).clamp_max(0.0), grouped.amax(2).clamp_min(0.0)


def multiplier_of(largest: float) -> float:
    """Return the power of two that scales are stored as multiples of; ``largest`` is the largest in magnitude.

    The usual one where that keeps them well inside fp16, else the one that brings the largest to between 1 and 2.
    """
    if largest == 0.0 or _LOWEST <= largest / USUAL_MULTIPLIER <= _HIGHEST:
        return USUAL_MULTIPLIER
    return math.ldexp(1.0, min(max(math.frexp(largest)[1] - 1, -126), 127))


def rounded_scales(scales: torch.Tensor, multiplier: float) -> torch.Tensor:
    """Return fp32 scales as fp16 multiples of ``multiplier`` hold them."""
    return (scales / multiplier).clamp(-_FP16_MAX, _FP16_MAX).half().float() * multiplier


def make_grid(
    low: torch.Tensor,
    high: torch.Tensor,
    group: int,
    bits: int,
    symmetric: bool,
    multiplier: float | None = None,
) -> Grid:
    """Return the grid whose groups span ``low`` … ``high``, fp32 (n, groups), 0 within each.

    The multiplier is chosen from the scales unless it is given (for a grid over part of a matrix).
    """
    if symmetric:
        extreme = torch.where(-low >= high, low, high)
        scales = -extreme / 2 ** (bits - 1)
    else:
        scales = high / (2**bits - 1) - low / (2**bits - 1)  # the difference itself could overflow
    if multiplier is None:
        multiplier = multiplier_of(float(scales.detach().abs().max()))
    scales = rounded_scales(scales, multiplier)
    if symmetric:
        zeros = torch.full_like(scales, float(2 ** (store_bits(bits) - 1)))
    else:
        zeros = (-low / nonzero(scales)).round().clamp(0, 2**bits - 1)
    return Grid(scales, zeros, multiplier, group, bits, symmetric)


def weight_grid(weight: torch.Tensor, group: int, bits: int, symmetric: bool) -> Grid:
    """Return the grid that spans each group of ``weight`` (n, k)."""
    low, high = group_extremes(weight, group)
    return make_grid(low, high, group, bits, symmetric)


def check_group(name: str, inputs: int, group: int) -> None:
    """Raise :class:`ModelError` unless ``group`` divides the ``inputs`` of the operator ``name``."""
    if group < 1 or inputs % group != 0:
        raise ModelError(
            f"{name} has {inputs} inputs, which the group size {group} does not divide: choose another group size, "
            f'"channel", or leave {name} out'
        )


def check_finite_weight(name: str, weight: torch.Tensor) -> None:
    """Raise :class:`ModelError` naming the tensor where it holds NaN or infinity."""
    if not bool(weight.isfinite().all()):
        raise ModelError(f"weight {name} holds NaN or infinite values: the model cannot be quantised")


def nonzero(scales: torch.Tensor) -> torch.Tensor:
    """Return the scales with 1 in place of 0: a group of zeros, or one too small to be held."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
