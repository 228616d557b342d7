"""Where the runtime's weights come from: a transformers model or directory, a quantised model, a packed directory.

A source hands out one matrix at a time, so that a model is never held twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from pareto_core.errors import DataError, ModelError
from pareto_cpu_runtime.configs import (
    CONFIG,
    generation_config_of,
    read_config,
    read_generation_config,
    read_json,
)
from pareto_cpu_runtime.families import model_name
from pareto_cpu_runtime.matrix import PANEL, Dense, Matrix, Panels, Quantised

if TYPE_CHECKING:
    import torch

    from pareto_cpu_runtime.families.description import Operator
    from pareto_cpu_runtime.quantise.config import Precision


class Source(Protocol):
    """A model's config and weights, by their names in the transformers state dict; ``directory`` is None in memory."""

    config: Any
    generation_config: Any
    directory: Path | None

    def matrix(self, module: str) -> Matrix:
        """The weight of the linear module of that name. Raises :class:`ModelError` if missing or not finite."""
        ...

    def panels(self, operator: Operator) -> Panels | None:
        """The operator's matrix in panels, where it is stored so."""
        ...

    def tensor(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, None where there is none."""
        ...

    def nbytes(self) -> int:
        """Bytes of the weights as they will lie in memory, about."""
        ...


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is a finite number, looked at in parts so that a large tensor needs no second one."""
    return all(bool(part.isfinite().all()) for part in tensor.split(1024))


def dense_of(tensor: torch.Tensor, name: str) -> Dense:
    """A matrix as it is: bf16 stays, other types become fp32. Raises :class:`ModelError` for NaN or infinity."""
    import torch

    if not is_finite(tensor):
        raise ModelError(f"{name} has values that are not finite")
    if tensor.dtype == torch.bfloat16:
        return Dense(values=tensor.detach().contiguous().view(torch.int16).numpy().view(np.uint16))
    return Dense(values=tensor.detach().float().contiguous().numpy())


def dense_bytes(tensor: torch.Tensor) -> int:
    """Bytes that :func:`dense_of` keeps of a tensor: two for each value of bf16, four for any other."""
    import torch

    return tensor.numel() * (2 if tensor.dtype == torch.bfloat16 else 4)


def quantised_of(linear: Any) -> Quantised:
    """A ``QuantisedLinear`` in the form that is cut and packed here."""
    return Quantised(
        codes=np.asarray(linear.codes),
        scales=np.asarray(linear.scales),
        zeros=None if linear.zeros is None else np.asarray(linear.zeros),
        group=int(linear.group),
        bits=4 if linear.bits <= 4 else 8,
        multiplier=float(linear.multiplier),
    )


class StateSource:
    """Weights of a state dict, each matrix rounded to nearest when asked for, or (``precision`` None) as it is.

    A matrix whose inputs the groups of a :class:`Precision` do not divide is refused. "int4", symmetric groups of 32,
    takes any model: such a matrix has one scale per output.
    """

    def __init__(
        self,
        config: Any,
        state: Mapping[str, torch.Tensor],
        precision: Precision | Literal["int4"] | None,
        generation_config: Any = None,
        directory: Path | None = None,
    ) -> None:
        from pareto_cpu_runtime.quantise.config import Precision

        self._any_model = precision == "int4"
        if precision == "int4":
            precision = Precision(bits=4, group_size=32, symmetric=True)
        self.config, self.directory = config, directory
        self.generation_config = generation_config_of(config, generation_config)
        self._state, self._precision = state, precision

    def matrix(self, module: str) -> Matrix:
        """See :class:`Source`; a head that is missing is tied to the embedding and kept as that is."""
        tensor = self.tensor(f"{module}.weight")
        if tensor is None:
            raise ModelError(f"the model has no {module}.weight")
        if tensor.dim() != 2:
            raise ModelError(f"{module}.weight has shape {tuple(tensor.shape)}, expected two dimensions")
        if self._precision is None:
            return dense_of(tensor, f"{module}.weight")
        from pareto_cpu_runtime.quantise.rtn import round_to_nearest

        precision = self._fitting(f"{module}.weight", tensor.shape[1])
        return quantised_of(round_to_nearest(tensor.detach(), precision, f"{module}.weight"))

    def _fitting(self, name: str, inputs: int) -> Precision:
        """The precision, with one scale per output where "int4" does not divide the inputs."""
        import dataclasses

        precision = self._precision
        assert precision is not None
        if inputs % precision.group(inputs) == 0:
            return precision
        if not self._any_model:
            raise ModelError(
                f"{name} has {inputs} inputs, which groups of {precision.group_size} do not divide: take a group size "
                'that divides them, or "channel"'
            )
        return dataclasses.replace(precision, group_size="channel")

    def panels(self, operator: Operator) -> None:
        """See :class:`Source`."""

    def tensor(self, name: str) -> torch.Tensor | None:
        """See :class:`Source`."""
        return self._state.get(name)

    def nbytes(self) -> int:
        """See :class:`Source`."""
        total, seen = 0, set()
        for name, tensor in self._state.items():
            if tensor.data_ptr() not in seen or tensor.device.type == "meta":
                seen.add(tensor.data_ptr())
                kept = tensor.dim() < 2 or "emb" in name or "wte" in name
                total += dense_bytes(tensor) if kept or self._precision is None else self._rounded_bytes(tensor)
        return total

    def _rounded_bytes(self, tensor: torch.Tensor) -> int:
        """Bytes of codes, scales and zero points."""
        precision, inputs = self._precision, tensor.shape[-1]
        assert precision is not None
        group = precision.group(inputs) if inputs % precision.group(inputs) == 0 else inputs
        codes = 4 if precision.bits <= 4 else 8
        return int(tensor.numel() * (codes / 8 + (2 if precision.symmetric else 3) / group))


class QuantisedSource:
    """Weights of a quantised model in memory."""

    directory = None

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.generation_config = generation_config_of(model.config, getattr(model, "generation_config", None))
        self._model = model

    def matrix(self, module: str) -> Matrix:
        """See :class:`Source`."""
        if module in self._model.matrices:
            linear = self._model.matrices[module]
            if not bool(linear.scales.isfinite().all()):
                raise ModelError(f"{module} has scales that are not finite")
            return quantised_of(linear)
        tensor = self.tensor(f"{module}.weight")
        if tensor is None:
            raise ModelError(f"the quantised model has no {module}")
        return dense_of(tensor, f"{module}.weight")

    def panels(self, operator: Operator) -> None:
        """See :class:`Source`."""

    def tensor(self, name: str) -> torch.Tensor | None:
        """See :class:`Source`."""
        return self._model.tensors.get(name)

    def nbytes(self) -> int:
        """See :class:`Source`."""
        return int(self._model.packed_bytes)


class PackedSource:
    """Weights of a packed directory. What is stored as the runtime lays it out goes from the file as it is."""

    def __init__(self, model: Any, mapped: bool) -> None:
        self.config, self.generation_config = model.config, model.generation_config
        self.directory: Path | None = model.directory
        self._model, self._mapped = model, mapped
        self._fused = {module: name for name, entry in model.matrices.items() for module in entry.modules}

    def panels(self, operator: Operator) -> Panels | None:
        """See :class:`Source`."""
        if operator.columns is not None or any(part.index is not None for part in operator.parts):
            return None
        modules = tuple(part.module for part in operator.parts)
        name = self._fused.get(modules[0], modules[0])
        entry = self._model.matrices.get(name)
        if entry is None or (entry.modules or (name,)) != modules:
            return None
        if operator.gated and (entry.order != "interleave" or entry.n % PANEL):
            return None
        return Panels(
            data=self._model.panels(name).numpy(),
            shape=(entry.n, entry.k),
            group=entry.group,
            bits=entry.store_bits,
            asymmetric=entry.asymmetric,
            multiplier=entry.multiplier,
            mapped=self._mapped,
        )

    def matrix(self, module: str) -> Matrix:
        """See :class:`Source`."""
        from pareto_cpu_runtime.quantise.fusion import split

        name = self._fused.get(module, module)
        if name in self._model.matrices:
            entry, linear = self._model.matrices[name], self._model.linear(name)
            if entry.modules:
                linear = split(linear, entry.rows, entry.order)[entry.modules.index(module)]
            return quantised_of(linear)
        tensor = self.tensor(f"{module}.weight")
        if tensor is None:
            raise ModelError(f"the packed model has no {module}")
        return dense_of(tensor, f"{module}.weight")

    def tensor(self, name: str) -> torch.Tensor | None:
        """See :class:`Source`."""
        return self._model.tensors.get(name)

    def nbytes(self) -> int:
        """See :class:`Source`."""
        return int(self._model.weight_bytes)


def read_packed(directory: Path, mode: str) -> PackedSource:
    """A packed directory, its hash and scales checked. Raises :class:`DataError` naming the file that does not fit."""
    from pareto_cpu_runtime.checkpoint import load_packed

    return PackedSource(load_packed(directory), mode == "map")


def read_directory(directory: Path, precision: Precision | Literal["int4"] | None) -> StateSource:
    """A transformers directory (config.json and safetensors), tensors mapped from the files, not read at once.

    Raises :class:`DataError` naming the file that is missing or broken, or the config that the tensors do not fit.
    """
    from safetensors import SafetensorError, safe_open

    kind = str(read_json(directory / CONFIG).get("model_type"))
    state: dict[str, torch.Tensor] = {}
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                names = {name: model_name(kind, name) for name in opened.keys()}  # noqa: SIM118
                state.update({own: opened.get_tensor(name) for name, own in names.items()})
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file}: not a whole safetensors file: {error}") from error
    config = read_config(directory, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return StateSource(config, state, precision, read_generation_config(directory, config), directory)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise DataError(f"{directory}: has neither model.safetensors nor model.safetensors.index.json")
        return [single]
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index}: not an index of safetensors files: {error}") from error
    files = [directory / name for name in names]
    for file in files:
        # By name: the hub's cache keeps links to files that lie elsewhere.
        if file.parent != directory or file.name in ("", "..") or not file.exists():
            raise DataError(f"{index}: names {file.name}, which is not in the directory")
    return files
