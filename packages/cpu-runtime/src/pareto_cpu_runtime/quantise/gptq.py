"""GPTQ: rounding column by column, later columns making up for the errors of earlier ones.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, https://arxiv.org/abs/2210.17323.

Symbols: W (n, k) the weight; H = 2 X X^T (k, k) over the calibration; B the width of a lazy block; T the upper
Cholesky factor of H^-1; E the errors of a block. A group's scale is set when its first column is reached, from weights
that hold all corrections so far: lazy blocks never straddle a group, nor groups a block, unlike in the released code.

``activation_order`` takes columns by falling diagonal of H. Groups keep their places in the packed format, so their
scales are then set beforehand, from the weights as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from pareto_cpu_runtime.quantise.config import GPTQConfig, Precision
from pareto_cpu_runtime.quantise.grid import Grid, code_range, group_extremes, make_grid, nonzero, weight_grid
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear
from pareto_cpu_runtime.quantise.moments import collect
from pareto_cpu_runtime.quantise.stage import Stage


def quantise_stage(stage: Stage) -> dict[str, QuantisedLinear]:
    """Quantise the operators of a stage, each against the inputs that the quantised blocks before give it.

    Operators that share their inputs share H; one H is held at a time, and the block runs once for each.
    """
    found: dict[str, QuantisedLinear] = {}
    for group in stage.input_groups():
        names = [name for name in group.operators if name in stage.precisions]
        if not names:
            continue
        hessian = collect(stage, [names])[names[0]].gram.mul_(2)
        order = column_order(hessian, stage.config.gptq)
        factor = inverse_factor(hessian, stage.config.gptq.damping, order)
        del hessian
        for name in names:
            found[name] = _solve(stage.weight(name), factor, order, stage.precisions[name], stage.config.gptq)
    return {name: found[name] for name in stage.precisions}


def gptq(weight: torch.Tensor, hessian: torch.Tensor, precision: Precision, config: GPTQConfig) -> QuantisedLinear:
    """Quantise ``weight`` (n, k) given H (k, k), both fp32."""
    order = column_order(hessian, config)
    return _solve(weight, inverse_factor(hessian.clone(), config.damping, order), order, precision, config)


def column_order(hessian: torch.Tensor, config: GPTQConfig) -> torch.Tensor | None:
    """Return the order in which columns are taken, None for the one they lie in."""
    if not config.activation_order:
        return None
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def inverse_factor(hessian: torch.Tensor, damping: float, order: torch.Tensor | None = None) -> torch.Tensor:
    """Return T, upper triangular with T^T T = (H + damping * mean(diag H) I)^-1, fp32 (k, k), columns in ``order``.

    H is overwritten. Inputs that were never active have a diagonal of 1. The damping grows tenfold while H is not
    positive definite.
    """
    h = hessian if order is None else hessian[order][:, order]
    diagonal = h.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal.add_((diagonal == 0).float())
    while True:
        diagonal.add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not int(failed):
            break
        damping *= 10
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True)


def _solve(
    weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor | None, precision: Precision, config: GPTQConfig
) -> QuantisedLinear:
    w = weight.float().clone()
    n, k = w.shape
    group = precision.group(k)
    grid = weight_grid(w, group, precision.bits, precision.symmetric)
    codes = torch.empty_like(w)
    if order is not None:
        codes[:, order] = _columns(w[:, order], factor, grid, order // group, config.block_columns)
        return QuantisedLinear.of(grid, codes)
    scales, zeros = torch.empty_like(grid.scales), torch.empty_like(grid.zeros)
    for first, last in lazy_blocks(k, group, config.block_columns):
        errors = torch.empty(n, last - first)
        for j in range(first, last):
            g = j // group
            if j % group == 0:
                low, high = group_extremes(w[:, j : j + group], group)
                part = make_grid(low, high, group, precision.bits, precision.symmetric, grid.multiplier)
                scales[:, g], zeros[:, g] = part.scales[:, 0], part.zeros[:, 0]
            codes[:, j], value = _round(w[:, j], scales[:, g], zeros[:, g], grid)
            errors[:, j - first] = (w[:, j] - value) / factor[j, j]
            # Eq. (2), by the Cholesky factor
            w[:, j:last] -= errors[:, j - first, None] * factor[None, j, j:last]
        # Eq. (4): the lazy update of all that follows
        w[:, last:] -= errors @ factor[first:last, last:]
    return QuantisedLinear.of(dataclasses.replace(grid, scales=scales, zeros=zeros), codes)


def lazy_blocks(k: int, group: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield first and last column of blocks at most ``width`` wide (or one group): whole groups, or within one."""
    if group <= width:
        step = width // group * group
        yield from ((first, min(first + step, k)) for first in range(0, k, step))
        return
    for start in range(0, k, group):
        yield from ((first, min(first + width, start + group)) for first in range(start, start + group, width))


def _columns(w: torch.Tensor, factor: torch.Tensor, grid: Grid, group_of: torch.Tensor, width: int) -> torch.Tensor:
    """The codes of columns in an order of their own, on a grid that is set."""
    codes, k = torch.empty_like(w), w.shape[1]
    for first in range(0, k, width):
        last = min(first + width, k)
        errors = torch.empty(len(w), last - first)
        for j in range(first, last):
            g = int(group_of[j])
            codes[:, j], value = _round(w[:, j], grid.scales[:, g], grid.zeros[:, g], grid)
            errors[:, j - first] = (w[:, j] - value) / factor[j, j]
            w[:, j:last] -= errors[:, j - first, None] * factor[None, j, j:last]
        w[:, last:] -= errors @ factor[first:last, last:]
    return codes


def _round(
    column: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values of one column."""
    codes = (column / nonzero(scale) + zero).round().clamp(*code_range(grid.bits, grid.symmetric))
    codes = torch.where(scale == 0, zero, codes)
    return codes, (codes - zero) * scale
