"""Equivalent transformations: scaling an operator's inputs, and undoing it in what makes them.

y = W x = (W diag(s)) (diag(s)^-1 x). Where x comes from a norm, its weight and bias take the 1 / s; where another
operator makes it in proportion (up before down in a gated FFN, V before the output projection), that one's rows do.
Which do is found by trying: a scaling is folded only where the block's outputs stay what they were.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from pareto_cpu_runtime.quantise.operators import is_linear, weight_of
from pareto_cpu_runtime.quantise.stage import Stage

#: relative difference of a block's outputs, in fp32, below which a folded scaling changed nothing
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Fold:
    """``operators`` share inputs that ``producer`` (a norm or an operator of the block) makes, in proportion."""

    producer: str
    operators: tuple[str, ...]


def find_folds(stage: Stage) -> list[Fold]:
    """Return the foldable scalings of a block, those into operators first; none for an operator of its own."""
    if not stage.is_block:
        return []
    with torch.no_grad():
        expected = _sample(stage)
        into_operators, into_norms = [], []
        for group in stage.input_groups():
            if not any(name in stage.precisions for name in group.operators):
                continue
            k = stage.weight(group.operators[0]).shape[1]
            if group.norm is not None:
                fold = Fold(group.norm, group.operators)
                weighted = getattr(stage.module.get_submodule(group.norm), "weight", None) is not None
                into_norms += [fold] if weighted and _holds(stage, fold, expected) else []
                continue
            candidates = [
                n for n in stage.all_operators() if n not in group.operators and stage.weight(n).shape[0] == k
            ]
            folds = (Fold(name, group.operators) for name in candidates)
            into_operators += [f for f in folds if _holds(stage, f, expected)][:1]
    return into_operators + into_norms


def apply(stage: Stage, fold: Fold, scales: torch.Tensor) -> None:
    """Multiply the operators' inputs by ``scales`` (k,) within their weights, and divide them in the producer."""
    with torch.no_grad():
        for name in fold.operators:
            stage.weight(name).mul_(scales)
        producer = stage.module.get_submodule(fold.producer)
        if is_linear(producer):
            weight_of(producer).div_(scales[:, None])
        else:
            _parameter(producer, "weight").div_(scales)
        if getattr(producer, "bias", None) is not None:
            _parameter(producer, "bias").div_(scales)


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    parameter = getattr(module, name)
    assert isinstance(parameter, torch.Tensor)
    return parameter.data


def _sample(stage: Stage) -> torch.Tensor:
    return stage.call(stage.module, stage.inputs[: stage.rows].float())


def _holds(stage: Stage, fold: Fold, expected: torch.Tensor) -> bool:
    """Whether a scaling by powers of two, which rounds nothing in the weights, leaves the outputs as they are."""
    k = stage.weight(fold.operators[0]).shape[1]
    scales = torch.tensor([0.5, 1.0, 4.0, 2.0, 0.25]).repeat(-(-k // 5))[:k]
    apply(stage, fold, scales)
    found = _sample(stage)
    apply(stage, fold, 1 / scales)
    return float((found - expected).norm()) <= TOLERANCE * float(expected.norm())
