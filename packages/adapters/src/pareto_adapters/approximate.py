"""The query, key and value projections of self-attention as one matrix, and how much of it an approximation keeps.

What S-LoDA and R-LoDA (:mod:`pareto_adapters.s_loda`, :mod:`pareto_adapters.r_loda`) share: chapter 5 approximates
W_proj = [W_q, W_k, W_v], of shape (in_features, sum of the out_features), as a whole.

- Where a model fuses the three (GPT-2's ``c_attn``), W_proj is that layer's weight. Where it does not, the three are
  taken together; their widths may differ (grouped queries).
- Cross-attention is left as it is: its queries read another input than its keys and values.
- Energy is the sum of squares, as in figure 5.2; :func:`energy_by_rank` and :func:`energy_by_share` are its curves.
- What was done is noted on the model, and in ``approximation.json`` beside it; :func:`approximation` tells it. PEFT
  saves adapters alone: a base is approximated before they are added, and again, likewise, before they are loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pareto_adapters._build import FUSED_SPELLINGS, SPELLINGS, attach, plain
from pareto_adapters._peft import FUSED, LinearMap, check_weight, linear_sizes
from pareto_adapters.loda import NOTE, LoDA
from pareto_core import ConfigError, Measurement, ModelError
from pareto_core.weights import require_files

if TYPE_CHECKING:
    from pareto_core import Task

#: the file that holds the same beside a saved model
FILE = "approximation.json"
#: names of modules that attend to another sequence than their own
CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Attention:
    """One self-attention: its ``name`` in the model, and the ``names`` of its projections in ``module``.

    There is one name where query, key and value are fused, and three, in this order, where they are not.
    """

    name: str
    module: nn.Module
    names: tuple[str, ...]

    @property
    def layers(self) -> list[Any]:
        """The projections."""
        return [getattr(self.module, name) for name in self.names]

    @property
    def bases(self) -> list[Any]:
        """The projections without the adapters around them."""
        return [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in self.layers]

    @property
    def in_features(self) -> int:
        """The width of the input."""
        return linear_sizes(self.bases[0])[0]

    @property
    def widths(self) -> list[int]:
        """The out_features of the projections."""
        return [linear_sizes(base)[1] for base in self.bases]

    def matrix(self) -> torch.Tensor:
        """W_proj: the weights side by side, of shape (in_features, sum of the out_features)."""
        return torch.cat([base.weight if isinstance(base, Conv1D) else base.weight.T for base in self.bases], 1)


def self_attentions(model: nn.Module) -> list[Attention]:
    """Every self-attention of ``model``, with or without adapters on its projections.

    Raises :class:`ModelError` where none has projections under a known name.
    """
    linear = (nn.Linear, Conv1D, LinearMap, BaseTunerLayer)
    spellings = [(name,) for name in FUSED_SPELLINGS]
    spellings += list(zip(*(SPELLINGS[part] for part in FUSED), strict=True))
    found = []
    for name, module in model.named_modules():
        children = {key for key, child in module.named_children() if isinstance(child, linear)}
        names = next((names for names in spellings if children.issuperset(names)), None)
        if names and not CROSS.search(".".join(name.split(".")[-2:])):
            found.append(Attention(name, module, names))
    if not found:
        known = ", ".join("/".join(names) for names in spellings)
        raise ModelError(f"{type(model).__name__} has no self-attention with projections of a known name: {known}")
    return found


def approximable(model: nn.Module) -> list[Attention]:
    """The self-attentions of ``model``, whose projections are all plain, finite and not yet approximated.

    Raises :class:`ModelError` where one is not; every layer is looked at before the first is handed out.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model: its projections cannot be approximated")
    if hasattr(model, NOTE):
        raise ModelError(f"the projections of this {type(model).__name__} are approximated already")
    attentions = self_attentions(model)
    for attention in attentions:
        for key, layer in zip(attention.names, attention.layers, strict=True):
            name = f"{attention.name}.{key}"
            if not isinstance(layer, (nn.Linear, Conv1D)):
                raise ModelError(f"{name!r} is {type(layer).__name__}: approximate the model before adapters are added")
            if layer.weight.numel() == 0:
                raise ModelError(f"{name}.weight is partitioned (ZeRO-3): approximate the model before it is sharded")
            check_weight(name, layer.weight)
    return attentions


def note(model: PreTrainedModel, kind: str, size: float, energies: dict[str, tuple[float, float]]) -> None:
    """Put on ``model`` what was done: ``kind`` and ``size`` (fraction kept, or rank).

    ``energies`` are (kept, total) by the name of the attention; not numbers, on the meta device, they are left out.
    """
    record: dict[str, Any] = {"kind": kind, "size": size}
    kept, total = (sum(column) for column in zip(*energies.values(), strict=True))
    if not math.isnan(total):
        record["energy"] = _share(kept, total)
        record["energy_by_attention"] = {name: _share(*pair) for name, pair in energies.items()}
    setattr(model, NOTE, record)


def approximation(model: nn.Module) -> dict[str, Any]:
    """How the projections of ``model`` are approximated.

    ``kind`` is ``sparse`` or ``low_rank``, ``size`` the fraction of entries or the rank that is kept, ``energy`` the
    share of the energy that is left, over all layers, and ``energy_by_attention`` the same for each. Raises
    :class:`ModelError` for a model that is not approximated.
    """
    model = plain(model)
    if not hasattr(model, NOTE):
        raise ModelError(f"the projections of this {type(model).__name__} are not approximated")
    return dict(getattr(model, NOTE))


def save_note(model: nn.Module, directory: Path) -> None:
    """Write ``approximation.json`` for a model that is approximated; nothing for others."""
    if hasattr(model, NOTE):
        (directory / FILE).write_text(json.dumps(approximation(model), indent=2) + "\n")


def energy(weight: torch.Tensor) -> float:
    """The sum of squares of ``weight``; not a number on the meta device."""
    return math.nan if weight.is_meta else float(weight.double().square().sum())


def energy_by_rank(weight: torch.Tensor) -> torch.Tensor:
    """The share of the energy of ``weight`` in its R largest singular values, for R = 1 … min(shape): figure 5.2a.

    Of a matrix of zeros, all of it. Raises :class:`ModelError` for what is no finite matrix.
    """
    _check_matrix("energy_by_rank", weight)
    running = left_singular(weight)[0].cumsum(0)[: min(weight.shape)]
    return running / running[-1] if running[-1] else torch.ones_like(running)


def energy_by_share(weight: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """The share of the energy of ``weight`` in its largest entries, for each of ``shares`` of them: figure 5.2b.

    Of a matrix of zeros, all of it. Raises :class:`ConfigError` for a share outside [0, 1], and :class:`ModelError` for
    what is no finite matrix.
    """
    for share in shares:
        if not (is_number(share) and 0 <= share <= 1):
            raise ConfigError("energy_by_share", "shares", share, "must be numbers from 0 to 1")
    _check_matrix("energy_by_share", weight)
    ordered = weight.double().square().flatten().sort(descending=True).values
    running = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    if not running[-1]:
        return torch.ones(len(shares), dtype=running.dtype, device=running.device)
    return running[[round(share * weight.numel()) for share in shares]] / running[-1]


def is_number(value: object) -> bool:
    """Whether ``value`` is an integer or a float; a boolean is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_matrix(function: str, weight: torch.Tensor) -> None:
    if weight.dim() != 2 or not weight.numel() or weight.is_meta:
        raise ModelError(f"{function} takes a matrix with values, found {tuple(weight.shape)} on {weight.device}")
    if not bool(weight.isfinite().all()):
        raise ModelError(f"{function} takes finite values, and the matrix holds NaN or infinite ones")


def left_singular(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of the singular values, falling, and the left singular vectors in columns, in double precision.

    By the eigenvectors of W·Wᵀ: a fraction of the time of a full decomposition, since W_proj is wide.
    """
    weight = weight.double()
    squares, vectors = torch.linalg.eigh(weight @ weight.T)
    return squares.clamp(min=0).flip(0), vectors.flip(1)


def _share(kept: float, total: float) -> float:
    return kept / total if total else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApproximatedLoDA(LoDA):
    """Base of S-LoDA and R-LoDA: a subclass says how projections are approximated."""

    def approximate(self, model: PreTrainedModel) -> None:
        """Approximate the projections of ``model`` in place."""
        raise TypeError(f"{type(self).__name__} must define approximate(model)")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Approximate the projections and put the maps beside them."""
        start = self.starting_model(task, model)
        config = self.tuner_config(start)
        self.approximate(start)
        return attach(start, config, task, self.train_layer_norms)

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """What :class:`LoDA` tells, and the share of the projections' energy that is left."""
        energy = 100 * approximation(deployed)["energy"]
        return (*super().figures(deployed), Measurement(name="projection_energy_percent", value=energy, unit="%"))

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote."""
        require_files(directory, "config.json", FILE)
        return super().load(directory)
