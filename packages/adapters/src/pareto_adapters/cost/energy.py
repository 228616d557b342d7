"""What an approximation keeps of the projections, as figure 5.2 draws it: ``python -m pareto_adapters.cost.energy``.

For each model, the share of the energy (sum of squares) of W_proj = [W_q, W_k, W_v] in its largest singular values, and
in its largest entries: of the first self-attention, as in the figure, and of all together. Arithmetic alone: it is the
same on every machine, up to rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import nn

from pareto_adapters.approximate import energy, energy_by_rank, energy_by_share, self_attentions
from pareto_core import ConfigError, ParetoError
from pareto_core.backbones import MINILM, TINY_GPT2, from_pretrained

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is left of the energy where ``share`` of the dimensions (``rank`` of them), or of the entries, is kept.

    Shares from 0 to 1, each as (first self-attention, all).
    """

    share: float
    rank: int
    by_rank: tuple[float, float]
    by_entries: tuple[float, float]


@torch.no_grad()
def energy_kept(model: nn.Module, shares: Sequence[float] = SHARES) -> tuple[Kept, ...]:
    """The energy that the self-attentions of ``model`` keep for each of ``shares``.

    Ranks are shares of the first W_proj's smaller side, rounded and at least 1. Raises :class:`ConfigError` for a share
    outside (0, 1], and :class:`ModelError` where no projections of a known name are found.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ConfigError("energy_kept", "shares", share, "must be above 0 and at most 1")
    matrices = [attention.matrix() for attention in self_attentions(model)]
    ranks = [max(1, round(share * min(matrices[0].shape))) for share in shares]
    curves = [energy_by_rank(matrix) for matrix in matrices]
    by_rank = torch.stack([curve[[min(rank, len(curve)) - 1 for rank in ranks]] for curve in curves])
    by_entries = torch.stack([energy_by_share(matrix, shares) for matrix in matrices])
    weights = torch.tensor([energy(matrix) for matrix in matrices], dtype=by_rank.dtype)
    rows = []
    for number, (share, rank) in enumerate(zip(shares, ranks, strict=True)):
        pairs = [
            (float(kept[0, number]), float(kept[:, number] @ weights / weights.sum())) for kept in (by_rank, by_entries)
        ]
        rows.append(Kept(share, rank, *pairs))
    return tuple(rows)


def markdown(name: str, rows: Sequence[Kept]) -> str:
    """A table for people, in percent."""
    lines = [
        f"| {name}: kept, % | rank | energy by rank: first layer, % | all, % | by entries: first layer, % | all, % |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        figures = [f"{100 * value:.1f}" for value in (*row.by_rank, *row.by_entries)]
        lines.append(f"| {100 * row.share:g} | {row.rank} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the tables of the models that were asked for."""
    from transformers import AutoModel

    parser = argparse.ArgumentParser(prog="python -m pareto_adapters.cost.energy", description=__doc__)
    models = (TINY_GPT2, MINILM)
    parser.add_argument("models", nargs="*", default=models, help="names, hub names or directories (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of dimensions and of entries")
    asked = parser.parse_args(arguments)
    try:
        for name in asked.models:
            print(markdown(name, energy_kept(from_pretrained(AutoModel, name), asked.shares)))
    except ParetoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
