"""Files of a model that adapters stay in: what the model holds decides what is written, not who trained it last.

Beside ``config.json`` and ``model.safetensors``, whose names are those of the model as it is, there are
``adapter_config.json`` (PEFT's) where layers are wrapped, ``approximation.json`` where projections are approximated,
and ``prefix/`` where keys and values stand in front.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer

from pareto_adapters._build import plain
from pareto_core import Method, ModelError
from pareto_core.weights import load_transformer, require_files, save_transformer

if TYPE_CHECKING:
    from torch import nn

    from pareto_core import Task

#: the file that says which adapters a model holds
ADAPTERS = "adapter_config.json"


def save_adapted(deployed: Any, directory: Path) -> None:
    """Write a model and all that stays in it. Raises :class:`pareto_core.ModelError` for what is no such model."""
    from pareto_adapters.approximate import save_note
    from pareto_adapters.prefix import save_prefix

    model: Any = plain(deployed)
    config = _only_config(model) if any(isinstance(module, BaseTunerLayer) for module in model.modules()) else None
    save_transformer(model, directory)
    if config is not None:
        config.save_pretrained(str(directory))
    save_note(model, directory)
    save_prefix(deployed, directory)


def _only_config(model: Any) -> peft.PeftConfig:
    configs = list(model.peft_config.values())
    if len(configs) != 1:
        raise ModelError(
            f"{type(model).__name__} holds {len(configs)} adapters ({', '.join(model.peft_config)}), of which a file "
            "takes one: delete_adapter the others"
        )
    config: peft.PeftConfig = configs[0]
    return config


def load_adapted(directory: Path) -> Any:
    """Read what :func:`save_adapted` wrote, in evaluation mode. Raises :class:`pareto_core.DataError`."""
    from pareto_adapters.prefix import load_prefix
    from pareto_adapters.r_loda import load_approximation

    def change(model: nn.Module) -> None:
        load_approximation(model, directory)
        if (directory / ADAPTERS).is_file():
            peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(directory)), model)

    return load_prefix(load_transformer(directory, change), directory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InPlace(Method):
    """Base of the methods that train weights of the model itself, beside whatever adapters it holds."""

    def save(self, deployed: Any, directory: Path) -> None:
        """Write the model, adapters included."""
        save_adapted(deployed, directory)

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote."""
        return load_adapted(directory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unmerged(InPlace):
    """Base of the methods whose adapters stay in the deployed model; they are saved in it."""

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        """Take the model out of PEFT's wrapper; the adapters stay."""
        if not isinstance(model, peft.PeftModel):
            raise ModelError(f"{type(model).__name__} holds no adapters: finish takes what build returned")
        return plain(model)

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote."""
        require_files(directory, "config.json", ADAPTERS)
        return super().load(directory)
