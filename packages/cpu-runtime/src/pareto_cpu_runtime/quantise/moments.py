"""Second moments of operators' inputs: all that GPTQ and AWQ need to know of the calibration.

The error that a change D of a weight makes in the outputs over the calibration is |X D^T|^2 = tr(D G D^T) with
G = X^T X; operators with the same inputs share their G.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from pareto_cpu_runtime.quantise.stage import Stage


@dataclasses.dataclass
class Moments:
    """Over the inputs x of some operators: ``gram`` sum of x x^T (k, k), ``mean`` mean of \\|x\\| (k,), both fp32."""

    gram: torch.Tensor
    mean: torch.Tensor
    tokens: int

    def scale(self, scales: torch.Tensor) -> None:
        """Turn these into the moments of x / ``scales`` (k,), in place."""
        self.gram.div_(scales[:, None]).div_(scales[None, :])
        self.mean.div_(scales)

    def error(self, change: torch.Tensor) -> float:
        """Return tr(D G D^T) of ``change`` D (n, k): the squared error of the outputs, summed over the calibration."""
        return float(((change @ self.gram) * change).sum())

    def group_errors(self, change: torch.Tensor, group: int) -> torch.Tensor:
        """Return d G_g d^T for each output and group of inputs alone, (n, groups): errors across groups left aside."""
        n, k = change.shape
        cells = change.view(n, k // group, group).transpose(0, 1)  # (groups, n, group)
        blocks = torch.stack([self.gram[i : i + group, i : i + group] for i in range(0, k, group)])
        return ((cells @ blocks) * cells).sum(2).t()


def collect(stage: Stage, groups: Sequence[Sequence[str]]) -> dict[str, Moments]:
    """Return the moments of each group of operators with the same inputs, by the names of all of them."""
    found: dict[str, Moments] = {}

    def visit(name: str, x: torch.Tensor) -> None:
        if name not in found:
            found[name] = Moments(x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1]), 0)
        moments = found[name]
        moments.gram.addmm_(x.t(), x)
        moments.mean.mul_(moments.tokens / (moments.tokens + len(x))).add_(x.abs().sum(0) / (moments.tokens + len(x)))
        moments.tokens += len(x)

    stage.each_input(visit, [group[0] for group in groups])
    return {name: found[group[0]] for group in groups for name in group if group[0] in found}
