"""What TEQ, SignRound and AutoRound share: rounding that gradients pass, and the reconstruction of a block.

A block with trial weights runs on the inputs that the quantised blocks before it give; its loss is the mean squared
difference from what the original block gives on original inputs. Rounding passes gradients straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pareto_cpu_runtime.quantise.grid import Grid, code_range, make_grid
from pareto_cpu_runtime.quantise.operators import transposed
from pareto_cpu_runtime.quantise.stage import Stage

Weights = Mapping[str, torch.Tensor]


def fake_quantise(weight: torch.Tensor, grid: Grid, offset: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``weight`` (n, k) on ``grid``, moved by ``offset`` (n, k) steps before rounding; differentiable."""
    steps = grid.real_codes(weight)
    if offset is not None:
        steps = steps + offset
    codes = steps + (steps.round() - steps).detach()
    return grid.values(codes.clamp(*code_range(grid.bits, grid.symmetric)))


def tuned_codes(weight: torch.Tensor, grid: Grid, offset: torch.Tensor) -> torch.Tensor:
    """Return the codes fp32 (n, k) that :func:`fake_quantise` rounds to."""
    codes = (grid.real_codes(weight) + offset).round().clamp(*code_range(grid.bits, grid.symmetric))
    dead = (grid.scales == 0).repeat_interleave(grid.group, 1)
    return torch.where(dead, grid.zeros.repeat_interleave(grid.group, 1), codes)


def straight_scales(low: torch.Tensor, high: torch.Tensor, like: Grid) -> Grid:
    """Return a grid over ``low`` … ``high`` (n, groups) in the manner of ``like``; its scales pass gradients."""
    return make_grid(low, high, like.group, like.bits, like.symmetric, like.multiplier)


class WithWeights:
    """The block of a stage with other weights in place of its operators': called as the block is."""

    def __init__(self, module: nn.Module, weights: Weights) -> None:
        self.module = module
        self.values = {
            f"{name}.weight": weight.t() if transposed(module.get_submodule(name)) else weight
            for name, weight in weights.items()
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        return torch.func.functional_call(self.module, self.values, args, kwargs)


def loss_of(stage: Stage, weights: Weights, rows: torch.Tensor) -> torch.Tensor:
    """Return the loss over the calibration rows of these numbers."""
    output = stage.call(WithWeights(stage.module, weights), stage.inputs[rows].float())
    return torch.nn.functional.mse_loss(output, stage.targets[rows].float())


def total_loss(stage: Stage, weights: Weights) -> float:
    """Return the loss over all calibration rows."""
    with torch.no_grad():
        parts = torch.arange(len(stage.inputs)).split(stage.rows)
        return sum(float(loss_of(stage, weights, rows)) for rows in parts) / len(parts)


def batches(stage: Stage, steps: int, batch: int) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield, for each step, the share of the learning rate (falling linearly from 1 to 0) and the rows to train on."""
    size = min(batch, len(stage.inputs))
    for step in range(steps):
        yield 1.0 - step / steps, torch.randperm(len(stage.inputs))[:size]


def best_of(stage: Stage, candidates: list[Callable[[], Weights]]) -> int:
    """Return the number of the candidate with the least loss over all of the calibration; the first of equals."""
    with torch.no_grad():
        losses = [total_loss(stage, make()) for make in candidates]
    return min(range(len(losses)), key=losses.__getitem__)
