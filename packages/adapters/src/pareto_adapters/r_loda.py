"""R-LoDA and R-LoDA+: LoDA beside projections of low rank.

J. Liu, T. Koike-Akino, P. Wang, M. Brand, Y. Wang, K. Parsons, "LoDA: Low-Dimensional Adaptation of Large Language
Models", 2023, https://www.merl.com/publications/TR2023-150; numbers are those of the book chapter (chapter 5).

Reproduced: section 5.2.2. W_proj = [W_q, W_k, W_v] of each self-attention is replaced by its truncated singular value
decomposition, which stays frozen; biases are kept.

Symbols, for a self-attention of width d whose projections are D wide together (3d, less with grouped queries):

====== ======= ============================================================
W_proj (d, D)  the projections side by side
W_A    (d, R)  its R largest left singular vectors
W_B    (R, D)  W_Aᵀ·W_proj, so that W_A·W_B is the best approximation of rank R
====== ======= ============================================================

Where query, key and value are separate layers, each holds its columns of W_B, W_A is one module beside them, and X·W_A
is computed once for all three (:class:`SharedFactor`). It saves multiplications and memory where R < d·D / (d + D),
which is 3d/4 for D = 3d.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from pareto_adapters._peft import LinearMap
from pareto_adapters.approximate import (
    FILE,
    NOTE,
    ApproximatedLoDA,
    Attention,
    approximable,
    energy,
    left_singular,
    note,
    self_attentions,
)
from pareto_adapters.loda import LoDAPlus
from pareto_core import ConfigError, ModelError


class Product(NamedTuple):
    """What a :class:`SharedFactor` remembers: an input, its product, the gradient mode, and who has not read it."""

    x: torch.Tensor
    result: torch.Tensor
    grad: bool
    waiting: frozenset[int]


class SharedFactor(nn.Module):
    """W_A of projections that read the same input, whose product with that input is computed once.

    The product is remembered until each of the ``readers`` has read it or :meth:`forget` is called, and given only for
    the very same tensor, in the same gradient mode, and once to each reader: a second call of one computes it anew.
    """

    def __init__(self, weight: torch.Tensor, readers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.readers = readers
        self._product: Product | None = None

    def forward(self, x: torch.Tensor, reader: int) -> torch.Tensor:
        """Map ``x`` (…, in_features) to x·W_A (…, R) for the projection with the number ``reader``."""
        if torch.compiler.is_compiling():  # the compiler merges equal products itself
            return functional.linear(x, self.weight)
        grad, product = torch.is_grad_enabled(), self._product
        if product is None or product.x is not x or product.grad != grad or reader not in product.waiting:
            product = Product(x, functional.linear(x, self.weight), grad, frozenset(range(self.readers)))
        waiting = product.waiting - {reader}
        self._product = product._replace(waiting=waiting) if waiting else None
        return product.result

    def forget(self, *_: object) -> None:
        """Drop the product: the hook of an attention that has ended, since ZeRO-3 hands each reader another tensor."""
        self._product = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_product": None}


class LowRank(LinearMap):
    """A linear layer as a product: the shared W_A, and its own columns of W_B as ``weight`` (out_features, R)."""

    def __init__(self, factor: SharedFactor, reader: int, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = factor.weight.shape[1], weight.shape[0]
        self.reader = reader
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)
        object.__setattr__(self, "factor", factor)  # not as a submodule: it has its place beside the projections

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x·W_A·W_B and the bias, (…, in_features) to (…, out_features)."""
        return functional.linear(self.factor(x, self.reader), self.weight, self.bias)


def truncate(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """W_A (d, R) and W_B (R, D) of ``weight`` (d, D), in its dtype, and the energy of their product.

    On the meta device, factors of these shapes and an energy that is not a number.
    """
    if weight.is_meta:
        return weight.new_empty(len(weight), rank), weight.new_empty(rank, weight.shape[1]), energy(weight)
    squares, vectors = left_singular(weight)
    w_a = vectors[:, :rank]
    return w_a.to(weight.dtype), (w_a.T @ weight.double()).to(weight.dtype), float(squares[:rank].sum())


@torch.no_grad()
def truncate_projections(model: PreTrainedModel, rank: int) -> None:
    """Replace W_proj of every self-attention by its approximation of rank ``rank``, in place.

    :func:`~pareto_adapters.approximate.approximation` then tells the energy that is left. Raises :class:`ConfigError`
    for a rank that is no integer above 0, and :class:`ModelError`, before anything is changed, for a model whose
    projections are not plain or have fewer than ``rank`` dimensions.
    """
    energies = {}
    for attention in _of_rank(model, rank):
        weight = attention.matrix()
        w_a, w_b, kept = truncate(weight, rank)
        _replace(attention, w_a, w_b)
        energies[attention.name] = kept, energy(weight)
    note(model, "low_rank", rank, energies)


def _of_rank(model: PreTrainedModel, rank: int) -> list[Attention]:
    if type(rank) is not int or rank < 1:
        raise ConfigError("truncate_projections", "rank", rank, "must be an integer above 0")
    attentions = approximable(model)
    for attention in attentions:
        full = min(attention.matrix().shape)
        if rank > full:
            raise ModelError(f"rank = {rank}, but the projections of {attention.name!r} have rank {full} at most")
    return attentions


def _replace(attention: Attention, w_a: torch.Tensor, w_b: torch.Tensor) -> None:
    factor = SharedFactor(w_a.T.contiguous(), len(attention.names))
    parts = zip(attention.names, attention.layers, w_b.split(attention.widths, 1), strict=True)
    for reader, (name, layer, part) in enumerate(parts):
        setattr(attention.module, name, LowRank(factor, reader, part.T.contiguous(), layer.bias))
    attention.module.add_module("W_A", factor)
    attention.module.register_forward_hook(factor.forget, always_call=True)


def load_approximation(model: PreTrainedModel, directory: Path) -> None:
    """Give a new ``model`` the note and the modules, without values, of an approximated one saved in ``directory``."""
    path = directory / FILE
    if not path.is_file():
        return
    record = json.loads(path.read_text())
    setattr(model, NOTE, record)
    if record["kind"] == "low_rank":
        for attention in self_attentions(model):
            weight, rank = attention.matrix(), record["size"]
            _replace(attention, weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLoDA(ApproximatedLoDA):
    """LoDA on a task's backbone whose query, key and value projections together have rank ``rank``."""

    rank: int = 300

    def validate(self) -> None:
        """Check ranges; whether the projections have so many dimensions is known when there is a model."""
        super().validate()
        self.require("rank", self.rank > 0, "must be above 0")

    def approximate(self, model: PreTrainedModel) -> None:
        """Put factors in place of the projections."""
        truncate_projections(model, self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLoDAPlus(RLoDA, LoDAPlus):
    """As :class:`RLoDA`, with LoDA+."""
