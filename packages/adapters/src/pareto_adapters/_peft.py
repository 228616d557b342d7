"""The coupling to Hugging Face PEFT: everything that a tuner needs and no method repeats.

A method contributes a configuration (a :class:`TunerConfig`) and a :class:`Cell`, the adapter of one layer under
one name; :func:`pareto_adapters._registration.register` makes the PEFT layer and tuner from the two. Saving, loading,
several adapters, disabling, merging, quantised bases, meta-device loading and the checks of what a user passes in
are here.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from pareto_core import ModelError
from pareto_core.errors import suggest


@dataclasses.dataclass
class TunerConfig(PeftConfig):
    """Which layers a tuner adapts; the fields mean what they mean in PEFT's own configurations.

    ``target_modules`` are suffixes of module names, one regular expression, ``"all-linear"``, or None for PEFT's choice
    for the architecture (the query and value projections). ``modules_to_save`` are trained and saved whole, under each
    adapter's name. ``layers_to_transform`` keeps to the layers with these indices.
    """

    peft_name: ClassVar[str]

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.peft_name.upper()]
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, (list, tuple, set)):
                setattr(self, name, set(names))


class Cell(nn.Module):
    """One adapter of one layer: a plain module that maps (input, output of the layer) to the adapted output.

    A subclass takes ``(config, in_features, out_features)``, must not look at weights (under ZeRO-3 they are empty),
    and defines :meth:`forward`; one that adds a fixed matrix to the weight also defines :meth:`delta` and sets
    ``mergeable``.
    """

    mergeable: ClassVar[bool] = False

    @classmethod
    def refusal(cls, config: Any, in_features: int, out_features: int) -> str:
        """Say why a layer of this size cannot be adapted and what would do; empty where it can."""
        return ""

    def delta(self) -> torch.Tensor:
        """What merging adds to ``nn.Linear.weight``, of shape (out_features, in_features)."""
        raise ModelError(f"{type(self).__name__} cannot be merged into a weight")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Map the layer's input (..., in_features) and output (..., out_features) to the adapted output."""
        raise TypeError(f"{type(self).__name__} must define forward(x, y)")


class Layer(nn.Module, BaseTunerLayer):
    """A linear layer (``nn.Linear``, transformers' ``Conv1D``, or quantised) with a cell for each adapter."""

    cell_type: ClassVar[type[Cell]]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: TunerConfig, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.update_layer(adapter_name, config)

    @property
    def cells(self) -> nn.ModuleDict:
        """The cells by adapter name."""
        return getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, config: TunerConfig) -> None:
        """Add (or start afresh) the cell of ``adapter_name``, on the device and in the dtype of the base layer."""
        self.cells[adapter_name] = self.cell_type(config, self.in_features, self.out_features)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the base layer, then each active cell unless merged or disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.cells:
                y = self._adapt(self.cells[name], x, y)
        return y

    def _adapt(self, cell: Cell, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dtype = next(cell.parameters()).dtype
        if y.dtype == dtype or torch.is_autocast_enabled(x.device.type):
            return cell(x.to(dtype), y)
        return cell(x.to(dtype), y.to(dtype)).to(y.dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What ``adapter_name`` adds to the base weight, in the layout of that weight; at least single precision."""
        cell = self.cells[adapter_name]
        dtype = next(cell.parameters()).dtype
        delta = cell.delta().to(torch.promote_types(dtype, torch.float32))
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas of ``adapter_names`` (default: the active ones) to the base weight.

        Non-finite results are refused whatever ``safe_merge`` says, and leave the weight as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.cells:
                self._add_to_base(name, +1)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take every merged delta out of the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("already unmerged: nothing to do", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.cells:
                self._add_to_base(name, -1)

    def _add_to_base(self, name: str, sign: int) -> None:
        weight = self.get_base_weight()
        delta = self.get_delta_weight(name).to(weight.device)
        merged = (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + sign * delta).to(weight.dtype)
        if not bool(merged.isfinite().all()):
            raise ModelError(f"merging adapter {name!r} gives NaN or infinite weights: refused, nothing was changed")
        self.set_base_weight(merged)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether :meth:`get_delta_weight` says all that the adapter does."""
        return self.cell_type.mergeable

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].removesuffix('_cell')}.{super().__repr__()}"


class Tuner(BaseTuner):
    """Puts a :class:`Layer` around each targeted module; every refusal comes before the model is touched."""

    tuner_layer_cls: type[Layer]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: TunerConfig, model_config: dict[str, Any]) -> TunerConfig:
        known = self.target_module_mapping.get(model_config.get("model_type", ""))
        if peft_config.target_modules is None and known is None:
            raise ModelError(f"target_modules is needed for this architecture; {_linear_names(self.model)}")
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: TunerConfig, model: nn.Module) -> None:
        _maybe_include_all_linear_layers(peft_config, model)
        names = _names_outside_tuners(model)
        wanted = peft_config.target_modules
        for target in sorted(wanted) if isinstance(wanted, set) else []:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ModelError(f"target module {target!r} is not in the model; {_linear_names(model, target)}")
        matched = [name for name in names if name and self._check_target_module_exists(peft_config, name)]
        if not matched:
            raise ModelError(f"target_modules {_plain(wanted)} select nothing; {_linear_names(model)}")
        for name in matched:
            self._check_target(peft_config, name, model.get_submodule(name))

    def _check_target(self, config: TunerConfig, name: str, module: nn.Module) -> None:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(self))
        linear = isinstance(base, (nn.Linear, Conv1D)) if backend is None else backend.layer_type == "linear"
        if not linear:
            raise ModelError(f"target module {name!r} is {type(base).__name__}: only linear layers can be adapted")
        if backend is None:
            check_weight(name, base.weight)
        size = _get_in_out_features(base)
        refusal = self.tuner_layer_cls.cell_type.refusal(config, *size)
        if refusal:
            raise ModelError(f"{type(config).__name__} does not fit {name!r} ({size[0]} -> {size[1]}): {refusal}")

    def _create_and_replace(
        self,
        peft_config: TunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            if isinstance(module, self.tuner_layer_cls):
                self._check_mergeable(name, module)

    def _check_mergeable(self, name: str, layer: Layer) -> None:
        if not layer.cell_type.mergeable:
            raise ModelError(
                f"{layer.cell_type.__name__} at {name!r} cannot be merged: use the model as it is, or unload()"
            )
        for adapter in [key for key in layer.active_adapters if key in layer.cells]:
            if not all(bool(p.isfinite().all()) for p in layer.cells[adapter].parameters()):
                raise ModelError(f"adapter {adapter!r} at {name!r} holds NaN or infinite weights: nothing was merged")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        head, found, tail = key.rpartition(f"{container}{adapter_name}.")
        return f"{head}{container}{tail}" if found else super()._remove_adapter_name_from_key(key, adapter_name)


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raise :class:`ModelError` for a weight that no adapter can be trained beside: not floating, or not finite."""
    if not weight.is_floating_point():
        raise ModelError(
            f"{name}.weight is {weight.dtype}: load the model in a floating dtype, or quantised by PEFT's rules"
        )
    if weight.device.type != "meta" and not bool(weight.isfinite().all()):
        raise ModelError(f"{name}.weight holds NaN or infinite values: the model cannot be adapted")


def _names_outside_tuners(model: nn.Module) -> list[str]:
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name, _ in model.named_modules() if not name.startswith(layers)]


def _linear_names(model: nn.Module, wanted: str = "") -> str:
    linear = (nn.Linear, Conv1D, BaseTunerLayer)
    modules = [(name, model.get_submodule(name)) for name in _names_outside_tuners(model)]
    return suggest(wanted, {name.rpartition(".")[2] for name, module in modules if isinstance(module, linear)})


def _plain(names: Any) -> Any:
    return sorted(names) if isinstance(names, set) else names
