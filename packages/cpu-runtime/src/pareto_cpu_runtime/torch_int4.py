"""A linear layer on torch's own weight-only INT4 product for CPUs."""

from __future__ import annotations

import torch
from torch import nn


class Int4PackLinear(nn.Module):
    """Computes ``x`` W^T + b by ``aten::_weight_int4pack_mm_for_cpu``, W rounded to nearest in groups of inputs.

    A weight is (code - 8) · scale + zero, codes from 0 to 15, scale and zero in bf16 for each group. ``packed`` has the
    shape (n, k / 2), ``scales_and_zeros`` (k / group, n, 2).
    """

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, linear: nn.Linear, group: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = linear.in_features, linear.out_features, group
        codes, scales, zeros = rounded(linear.weight.detach().float(), group)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scales_and_zeros", torch.stack((scales.t(), zeros.t()), 2).contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x`` (..., in_features) in bf16."""
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.packed, self.group, self.scales_and_zeros
        )
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def rounded(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (n, k) int32, bf16 scales and zeros (n, k / group) of a weight (n, k), by its groups' extremes."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp_min(1e-6).to(torch.bfloat16)
    zeros = (low + 8 * scales.float()).to(torch.bfloat16)
    codes = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round() + 8
    return codes.clamp(0, 15).view_as(weight).int(), scales, zeros
