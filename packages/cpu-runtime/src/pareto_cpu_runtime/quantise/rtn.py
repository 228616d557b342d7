"""RTN: round to nearest, the baseline that every other method is measured against.

T. Dettmers, L. Zettlemoyer, "The case for 4-bit precision: k-bit Inference Scaling Laws", 2023,
https://arxiv.org/abs/2212.09720, describes the block-wise scaling used here; the rounding itself is folklore.

Each group of weights is spread over the grid by its extremes (:mod:`pareto_cpu_runtime.quantise.grid`), then each
weight takes the nearest code. No activations are looked at.
"""

from __future__ import annotations

import torch

from pareto_cpu_runtime.quantise.config import Precision
from pareto_cpu_runtime.quantise.grid import check_finite_weight, check_group, weight_grid
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear


def round_to_nearest(weight: torch.Tensor, precision: Precision, name: str = "weight") -> QuantisedLinear:
    """Quantise ``weight`` (n, k) of any floating dtype.

    Raises :class:`ModelError` naming ``name`` where the group size does not divide k or a value is not finite.
    """
    group = precision.group(weight.shape[1])
    check_group(name, weight.shape[1], group)
    check_finite_weight(name, weight)
    grid = weight_grid(weight, group, precision.bits, precision.symmetric)
    return QuantisedLinear.of(grid, grid.codes(weight))
