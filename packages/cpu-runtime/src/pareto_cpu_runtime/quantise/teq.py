"""TEQ: the scales of an equivalent transformation are trained.

W. Cheng, Y. Cai, K. Lv, H. Shen, "TEQ: Trainable Equivalent Transformation for Quantization of LLMs", 2023,
https://arxiv.org/abs/2310.10944.

Symbols: s (k,) scales an operator's inputs, Q rounds: y = Q(W diag(s)) (diag(s)^-1 x). s starts at 1 and is trained by
Adam at 1e-3 for 1000 steps, falling linearly. Where the paper trains all scales on the model's outputs at once, they
are trained here block by block on the block's outputs, so that only one block is held with its gradients. Scales that
find no place in a norm or an operator before them are not made. If trained scales are no better over the calibration
than none, there are none.
"""

from __future__ import annotations

import torch

from pareto_cpu_runtime.quantise.equivalent import Fold, apply, find_folds
from pareto_cpu_runtime.quantise.grid import group_extremes, weight_grid
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear
from pareto_cpu_runtime.quantise.rtn import round_to_nearest
from pareto_cpu_runtime.quantise.stage import Stage
from pareto_cpu_runtime.quantise.tuning import Weights, batches, best_of, fake_quantise, loss_of, straight_scales

#: scales are kept above this, so that none turns a channel round or off
_SMALLEST = 1e-2


def quantise_stage(stage: Stage) -> dict[str, QuantisedLinear]:
    """Train and fold the scales of a block in place, then round each operator of the stage."""
    folds = find_folds(stage)
    if folds:
        trained = train_scales(stage, folds)
        ones = [torch.ones_like(scales) for scales in trained]
        if best_of(stage, [lambda: transformed(stage, folds, ones), lambda: transformed(stage, folds, trained)]):
            for fold, scales in zip(folds, trained, strict=True):
                apply(stage, fold, scales)
    return {n: round_to_nearest(stage.weight(n), p, stage.full_name(n)) for n, p in stage.precisions.items()}


def train_scales(stage: Stage, folds: list[Fold]) -> list[torch.Tensor]:
    """Return s (k,) of each fold after training."""
    config = stage.config.teq
    scales = [torch.ones(stage.weight(fold.operators[0]).shape[1], requires_grad=True) for fold in folds]
    optimizer = torch.optim.Adam(scales, lr=config.learning_rate)
    for share, rows in batches(stage, config.steps, config.batch):
        optimizer.param_groups[0]["lr"] = config.learning_rate * share
        optimizer.zero_grad()
        loss_of(stage, transformed(stage, folds, scales), rows).backward()
        optimizer.step()
        with torch.no_grad():
            for tensor in scales:
                tensor.clamp_(min=_SMALLEST)
    return [tensor.detach() for tensor in scales]


def transformed(stage: Stage, folds: list[Fold], scales: list[torch.Tensor]) -> Weights:
    """Return Q(W diag(s)) diag(s)^-1 of every operator: its rounded weight, seen from outside the transformation.

    The rows of an operator that takes up the scales of a later one are left as they are: each has scales of its own.
    """
    of = {name: s for fold, s in zip(folds, scales, strict=True) for name in fold.operators}
    weights = {}
    for name, precision in stage.precisions.items():
        weight, s = stage.weight(name), of.get(name)
        scaled = weight if s is None else weight * s
        group = precision.group(weight.shape[1])
        plain = weight_grid(scaled.detach(), group, precision.bits, precision.symmetric)
        grid = straight_scales(*group_extremes(scaled, group), plain)
        rounded = fake_quantise(scaled, grid)
        weights[name] = rounded if s is None else rounded / s
    return weights
