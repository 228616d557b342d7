"""The first concept: a method, which turns a task's backbone into the module that is trained and deployed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from pareto_core.config import Config
from pareto_core.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pareto_core.result import Measurement
    from pareto_core.task import Task


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    authors: str
    year: int
    url: str


@runtime_checkable
class Deployed(Protocol):
    """What is measured: anything callable that knows the bytes of its weights.

    A finished ``nn.Module`` qualifies through :func:`pareto_core.weights.weight_bytes`; a native runtime or an
    estimator gives its own ``weight_bytes``. Where the task generates, it has ``generate`` as well.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: ``model(**batch)`` returns an object with ``.loss`` and ``.logits``."""


class Edit(Protocol):
    """Reads and writes full parameters while training, whatever the engine made of them (ZeRO shards, fp32 masters).

    Every tensor has the parameter's full shape; values are fp32.
    """

    def get(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the fp32 master of ``parameter``."""
        ...

    def set(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Write ``value`` to ``parameter`` and to its fp32 master."""
        ...

    def get_state(self, parameter: torch.Tensor, key: str) -> torch.Tensor | None:
        """Return the optimizer state ``key`` (such as ``exp_avg``), None before the first step."""
        ...

    def set_state(self, parameter: torch.Tensor, key: str, value: torch.Tensor) -> None:
        """Write the optimizer state ``key``."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Config):
    """An efficiency technique: its fields are the paper's hyper-parameters, its defaults the paper's.

    The runner calls ``prepare``, ``build``, ``after_step`` (once per optimizer step) and ``finish``, in this order.
    Before ``build`` it has frozen every parameter of the model; ``build`` unfreezes what is trained, the task's head
    included (:attr:`pareto_core.task.TaskSpec.head`). Where nothing is trainable, nothing is trained.
    """

    paper: ClassVar[Paper | None] = None
    #: ``finish`` must leave outputs as they were, up to rounding; the runner and the conformance suite check it.
    finishes_exactly: ClassVar[bool] = True

    def prepare(self, task: Task) -> None:
        """Compute once, before training, what the method needs (caches, calibration). Default: nothing."""

    def build(
        self,
        task: Task,
        model: nn.Module | Mapping[str, nn.Module] | None = None,
        teacher: nn.Module | None = None,
    ) -> nn.Module:
        """Return the module to train or run, made from ``model`` (default: the task's backbone, frozen)."""
        raise TypeError(f"{type(self).__name__} must define build(task, model, teacher)")

    def after_step(self, model: nn.Module, progress: float, edit: Edit) -> None:
        """Act after an optimizer step; ``progress`` runs from 0 to 1. Default: nothing."""

    def finish(self, model: nn.Module, task: Task) -> Any:
        """Turn the trained module into what is deployed (merge, strip, quantise, pack). Default: identity."""
        return model

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """Return what only the method can tell of what it deploys (multiplications, energy kept). Default: nothing."""
        return ()

    def save(self, deployed: Any, directory: Path) -> None:
        """Write ``deployed`` as safetensors and JSON. Default: a transformers model."""
        from pareto_core.weights import save_transformer

        save_transformer(deployed, directory)

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote. Default: a transformers model."""
        from pareto_core.weights import load_transformer

        return load_transformer(directory)

    def starting_model(self, task: Task, model: nn.Module | Mapping[str, nn.Module] | None) -> nn.Module:
        """Return ``model``, or the task's backbone with every parameter frozen, as a single module.

        Raises :class:`ModelError` where the task has no backbone or has several.
        """
        from torch import nn as torch_nn

        start = task.frozen_backbone() if model is None else model
        if not isinstance(start, torch_nn.Module):
            kind = "no backbone" if start is None else "several backbones"
            raise ModelError(f"{type(self).__name__} works on one module; task {task.name} has {kind}")
        return start
