"""The loop of SignRound and AutoRound: signed gradients on how each weight is rounded.

Per operator there is V (n, k), by which weights are moved before rounding, and for AutoRound alpha and beta
(n, groups), by which the lowest and highest weight of a group are multiplied.
"""

from __future__ import annotations

import dataclasses

import torch

from pareto_cpu_runtime.quantise.grid import Grid, group_extremes, make_grid, weight_grid
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear
from pareto_cpu_runtime.quantise.rtn import round_to_nearest
from pareto_cpu_runtime.quantise.stage import Stage
from pareto_cpu_runtime.quantise.tuning import Weights, batches, best_of, fake_quantise, loss_of, tuned_codes

Parameters = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """One operator: its weight W (n, k), extremes (n, groups), and the grid that plain rounding would use."""

    weight: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    plain: Grid

    def start(self, clips: bool) -> Parameters:
        """Return V = 0, and alpha = beta = 1 where ``clips``: plain rounding."""
        parameters = {"V": torch.zeros_like(self.weight)}
        if clips:
            parameters |= {"alpha": torch.ones_like(self.low), "beta": torch.ones_like(self.low)}
        return parameters

    def grid(self, parameters: Parameters) -> Grid:
        """Return the grid between the clipped extremes."""
        if "alpha" not in parameters:
            return self.plain
        low, high = self.low * parameters["beta"], self.high * parameters["alpha"]
        return make_grid(low, high, self.plain.group, self.plain.bits, self.plain.symmetric, self.plain.multiplier)

    def value(self, parameters: Parameters) -> torch.Tensor:
        """Return the rounded weight (n, k), differentiable in the parameters."""
        return fake_quantise(self.weight, self.grid(parameters), parameters["V"])

    def result(self, parameters: Parameters) -> QuantisedLinear:
        """Return the quantised matrix of these parameters."""
        grid = self.grid(parameters)
        return QuantisedLinear.of(grid, tuned_codes(self.weight, grid, parameters["V"]))


def tune(stage: Stage, clips: bool) -> dict[str, QuantisedLinear]:
    """Quantise a stage: the best, over all of the calibration, of plain rounding, the best step's and the last's.

    ``clips`` adds alpha and beta. The output embedding, whose outputs are too wide to train on, is rounded plainly.
    """
    if not stage.is_block:
        return {n: round_to_nearest(stage.weight(n), p, stage.full_name(n)) for n, p in stage.precisions.items()}
    operators = {name: _rounding(stage, name) for name in stage.precisions}
    start = {name: operator.start(clips) for name, operator in operators.items()}
    best, last = _descend(stage, operators, {n: {k: v.clone() for k, v in p.items()} for n, p in start.items()})
    candidates = [start, best, last]
    chosen = candidates[best_of(stage, [lambda c=c: _values(operators, c) for c in candidates])]
    return {name: operator.result(chosen[name]) for name, operator in operators.items()}


def _rounding(stage: Stage, name: str) -> Rounding:
    weight, precision = stage.weight(name).contiguous(), stage.precisions[name]
    group = precision.group(weight.shape[1])
    low, high = group_extremes(weight, group)
    return Rounding(weight, low, high, weight_grid(weight, group, precision.bits, precision.symmetric))


def _values(operators: dict[str, Rounding], parameters: dict[str, Parameters]) -> Weights:
    return {name: operator.value(parameters[name]) for name, operator in operators.items()}


def _descend(
    stage: Stage, operators: dict[str, Rounding], parameters: dict[str, Parameters]
) -> tuple[dict[str, Parameters], dict[str, Parameters]]:
    """Signed gradient descent, in place; returns the parameters of the step with the least loss, and the last."""
    config = stage.config.rounding
    leaves = [(kind, tensor.requires_grad_(True)) for p in parameters.values() for kind, tensor in p.items()]
    best, least = {n: {k: v.detach().clone() for k, v in p.items()} for n, p in parameters.items()}, float("inf")
    for share, rows in batches(stage, config.steps, config.batch):
        loss = loss_of(stage, _values(operators, parameters), rows)
        if float(loss.detach()) < least:
            least = float(loss.detach())
            for name, kept in best.items():
                for kind, tensor in kept.items():
                    tensor.copy_(parameters[name][kind].detach())
        gradients = torch.autograd.grad(loss, [tensor for _, tensor in leaves])
        with torch.no_grad():
            for (kind, tensor), gradient in zip(leaves, gradients, strict=True):
                # SignRound's update: V <- V - lr * sign(dL/dV), within its bounds
                tensor.sub_(gradient.sign(), alpha=config.rate * share)
                tensor.clamp_(*((-0.5, 0.5) if kind == "V" else (0.0, 1.0)))
    return best, {n: {k: v.detach() for k, v in p.items()} for n, p in parameters.items()}
