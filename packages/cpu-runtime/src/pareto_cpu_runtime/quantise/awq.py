"""AWQ: channels that see large activations are scaled up before rounding, and weights clipped where that helps.

J. Lin, J. Tang, H. Tang, S. Yang, W.-M. Chen, W.-C. Wang, G. Xiao, X. Dang, C. Gan, S. Han, "AWQ: Activation-aware
Weight Quantization for LLM Compression and Acceleration", 2023, https://arxiv.org/abs/2306.00978.

Symbols: s_X the mean magnitude of each input channel; s = s_X^alpha its scale, normalised by sqrt(max s * min s) as in
the released code; L the error of the outputs. L is not taken on samples but, over all of the calibration, from the
second moments of the inputs. It is the sum over the operators that share their inputs, where the released code runs the
module around them. Operators whose scale finds no place in a norm or an operator before them are clipped only.
The ratios of clipping are chosen per output and group, and kept where they lower the error of the whole operator.
"""

from __future__ import annotations

import torch

from pareto_cpu_runtime.quantise.config import AWQConfig, Precision
from pareto_cpu_runtime.quantise.equivalent import Fold, apply, find_folds
from pareto_cpu_runtime.quantise.grid import Grid, group_extremes, make_grid, weight_grid
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear
from pareto_cpu_runtime.quantise.moments import Moments, collect
from pareto_cpu_runtime.quantise.stage import Stage

#: rows of a weight that are searched at a time: the search holds several copies of them
_ROWS = 64


def quantise_stage(stage: Stage) -> dict[str, QuantisedLinear]:
    """Scale what can be scaled, in place, then clip and round each operator of the stage.

    Scalings that are folded into operators come first, so that those are rounded as they end up. The moments of one
    group of operators are held at a time, and the block runs once for each.
    """
    folds = find_folds(stage)
    folded = {name for fold in folds for name in fold.operators}
    others = [Fold("", group.operators) for group in stage.input_groups() if group.operators[0] not in folded]
    found: dict[str, QuantisedLinear] = {}
    for fold in [*folds, *others]:
        names = [name for name in fold.operators if name in stage.precisions]
        if not names:
            continue
        moments = collect(stage, [names])[names[0]]
        if fold.producer:
            scales = search_scales(stage, fold, moments)
            apply(stage, fold, scales)
            moments.scale(scales)
        for name in names:
            found[name] = clipped(stage.weight(name), moments, stage.precisions[name], stage.config.awq)
    return {name: found[name] for name in stage.precisions}


def search_scales(stage: Stage, fold: Fold, moments: Moments) -> torch.Tensor:
    """Return the best s (k,) of those that alpha in [0, 1) gives; alpha = 0 scales nothing."""
    operators = [(stage.weight(n), stage.precisions[n]) for n in fold.operators if n in stage.precisions]
    best = torch.ones_like(moments.mean)
    best_error = float("inf")
    for point in range(stage.config.awq.grid):
        # Eq. (5): s = s_X^alpha
        scales = moments.mean.clamp_min(1e-4) ** (point / stage.config.awq.grid)
        scales = scales / (scales.max() * scales.min()).sqrt()
        # Eq. (4): L(s) = |Q(W diag(s)) (diag(s)^-1 X) - W X|
        error = sum(_scaled_error(part, scales, p, moments) for w, p in operators for part in w.split(_ROWS))
        if error < best_error:
            best, best_error = scales, error
    return best


def _scaled_error(weight: torch.Tensor, scales: torch.Tensor, precision: Precision, moments: Moments) -> float:
    """The error of some rows that are scaled, rounded and scaled back."""
    scaled = weight * scales
    grid = weight_grid(scaled, precision.group(weight.shape[1]), precision.bits, precision.symmetric)
    return moments.error(grid.values(grid.codes(scaled)) / scales - weight)


def clipped(weight: torch.Tensor, moments: Moments, precision: Precision, config: AWQConfig) -> QuantisedLinear:
    """Round ``weight`` (n, k) on the grids that leave the least error, each group's extremes shrunk by a ratio."""
    group = precision.group(weight.shape[1])
    plain = weight_grid(weight, group, precision.bits, precision.symmetric)
    parts = [_ratios(part, moments, precision, config, plain.multiplier) for part in weight.split(_ROWS)]
    ratios = torch.cat(parts)
    low, high = group_extremes(weight, group)
    shrunk = make_grid(low * ratios, high * ratios, group, precision.bits, precision.symmetric, plain.multiplier)
    better = moments.error(_change(shrunk, weight)) < moments.error(_change(plain, weight))
    grid = shrunk if better else plain
    return QuantisedLinear.of(grid, grid.codes(weight))


def _ratios(
    weight: torch.Tensor, moments: Moments, precision: Precision, config: AWQConfig, multiplier: float
) -> torch.Tensor:
    """The best ratio of each group (n, groups), errors across groups left aside."""
    group = precision.group(weight.shape[1])
    low, high = group_extremes(weight, group)
    best, least = torch.ones_like(low), torch.full_like(low, float("inf"))
    for step in range(config.clip_steps + 1):
        ratio = 1.0 - config.clip_range * step / max(config.clip_steps, 1)
        grid = make_grid(low * ratio, high * ratio, group, precision.bits, precision.symmetric, multiplier)
        errors = moments.group_errors(_change(grid, weight), group)
        best = torch.where(errors < least, ratio, best)
        least = torch.minimum(errors, least)
    return best


def _change(grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    return grid.values(grid.codes(weight)).sub_(weight)
