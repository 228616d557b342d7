"""S-LoDA and S-LoDA+: LoDA beside projections of which only the largest entries are kept.

J. Liu, T. Koike-Akino, P. Wang, M. Brand, Y. Wang, K. Parsons, "LoDA: Low-Dimensional Adaptation of Large Language
Models", 2023, https://www.merl.com/publications/TR2023-150; numbers are those of the book chapter (chapter 5).

Reproduced: section 5.2.2. W_proj = [W_q, W_k, W_v] of each self-attention is replaced by W_Sparse, which keeps the
fraction s = ``keep`` of its entries of largest magnitude (one threshold over the three), and stays frozen.

Deviation: the zeros are stored and multiplied. At these densities PyTorch's product with a matrix of compressed rows
takes 2 to 3.5 times as long as the dense one (1024 to 3072 features, one or 512 tokens, 40 or 60 % kept, one thread of
a CPU). So the multiplications that the chapter counts as saved are saved where kernels for sparse weights exist.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pareto_adapters.approximate import ApproximatedLoDA, approximable, energy, is_number, note
from pareto_adapters.loda import LoDAPlus
from pareto_core import ConfigError


def largest(weight: torch.Tensor, keep: float) -> torch.Tensor:
    """A mask of the shape of ``weight`` over its round(keep·size) entries of largest magnitude."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().flatten().topk(round(keep * weight.numel()), sorted=False).indices] = True
    return mask.view(weight.shape)


@torch.no_grad()
def sparsify_projections(model: PreTrainedModel, keep: float) -> None:
    """Zero all but the fraction ``keep`` of the entries of W_proj of every self-attention, in place.

    :func:`~pareto_adapters.approximate.approximation` then tells the energy that is left. Raises :class:`ConfigError`
    for what is no number in (0, 1], and :class:`ModelError`, before anything is changed, for a model whose projections
    are not plain.
    """
    if not (is_number(keep) and 0 < keep <= 1):
        raise ConfigError("sparsify_projections", "keep", keep, "must be a number above 0 and at most 1")
    energies = {}
    for attention in approximable(model):
        weight = attention.matrix()
        sparse = weight * largest(weight, keep)
        for layer, part in zip(attention.layers, sparse.split(attention.widths, 1), strict=True):
            layer.weight.data = (part if isinstance(layer, Conv1D) else part.T).contiguous()
        energies[attention.name] = energy(sparse), energy(weight)
    note(model, "sparse", keep, energies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLoDA(ApproximatedLoDA):
    """LoDA on a task's backbone whose query, key and value projections keep the fraction ``keep`` of their entries."""

    keep: float = 0.4

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self.require("keep", 0 < self.keep <= 1, "must be above 0 and at most 1")

    def approximate(self, model: PreTrainedModel) -> None:
        """Zero all but the largest entries."""
        sparsify_projections(model, self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLoDAPlus(SLoDA, LoDAPlus):
    """As :class:`SLoDA`, with LoDA+."""
