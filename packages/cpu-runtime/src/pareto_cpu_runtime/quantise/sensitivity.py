"""Which operators suffer most from being quantised: what to leave out first."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pareto_cpu_runtime.quantise.config import QuantisationConfig
from pareto_cpu_runtime.quantise.operators import operators, weight_of
from pareto_cpu_runtime.quantise.rtn import round_to_nearest


def rank(model: Any, tokens: torch.Tensor, config: QuantisationConfig) -> list[tuple[str, float]]:
    """Return the operators that ``config`` quantises with their errors, the most sensitive first.

    The error is |x W^T - x Q(W)^T| / |x W^T| over ``tokens`` (rows, length), Q rounding to nearest at the operator's
    precision and all else left as it was: what one operator alone does to its outputs. One pass over the tokens.
    """
    changes: dict[str, tuple[float, float]] = {}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        precision = config.precision(name)
        assert precision is not None

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # Rounded anew at each batch: holding every difference would take the model's memory again.
            weight = weight_of(module).float()
            x = args[0].detach().reshape(-1, weight.shape[1]).float()
            change = x @ (round_to_nearest(weight, precision, name).dequantise() - weight).t()
            squared, whole = changes.get(name, (0.0, 0.0))
            changes[name] = squared + float(change.square().sum()), whole + float((x @ weight.t()).square().sum())

        handles.append(module.register_forward_pre_hook(hook))

    for name, module in operators(model).items():
        if config.precision(name) is not None:
            watch(name, module)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            for part in tokens.split(config.batch_size):
                model(input_ids=part)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    errors = [(name, (change / whole) ** 0.5 if whole else 0.0) for name, (change, whole) in changes.items()]
    return sorted(errors, key=lambda item: -item[1])
