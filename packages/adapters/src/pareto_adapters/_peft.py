"""The coupling to Hugging Face PEFT: everything that a tuner needs and no method repeats.

A method contributes a configuration (a :class:`TunerConfig` for linear layers, a :class:`BlockConfig` for whole
feed-forward or attention blocks) and a :class:`Cell`, the adapter of one layer or block under one name;
:func:`pareto_adapters._registration.register` makes the PEFT layer and tuner from the two. Saving, loading, several
adapters, disabling, merging, quantised bases, meta-device loading and the checks of what a user passes in are here.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    onload_layer,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from pareto_core import ConfigError, ModelError
from pareto_core.errors import suggest

#: the parts of a fused projection, in the order in which GPT-2's ``c_attn`` holds them
FUSED = ("q", "k", "v")


@dataclasses.dataclass
class TunerConfig(PeftConfig):
    """Which layers a tuner adapts; the fields mean what they mean in PEFT's own configurations.

    ``target_modules`` are suffixes of module names, one regular expression, ``"all-linear"``, or None for PEFT's choice
    for the architecture (the query and value projections). ``modules_to_save`` are trained and saved whole, under each
    adapter's name. ``layers_to_transform`` keeps to the layers with these indices.

    ``fused_parts`` (some of ``q``, ``k``, ``v``) says that a target is one layer that computes query, key and value
    side by side, as GPT-2's ``c_attn`` does, and that each of the parts gets an adapter of its own; None adapts every
    target as one.
    """

    peft_name: ClassVar[str]

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fused_parts: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.peft_name.upper()]
        if self.fused_parts is not None:
            self.fused_parts = list(self.fused_parts)
            if not self.fused_parts or not set(self.fused_parts) <= set(FUSED):
                raise ConfigError(type(self).__name__, "fused_parts", self.fused_parts, "expected some of q, k, v")
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, (list, tuple, set)):
                setattr(self, name, set(names))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            expected = f"PEFT ignores it where target_modules is a text ({self.target_modules!r}): list the modules"
            raise ConfigError(type(self).__name__, "layers_to_transform", self.layers_to_transform, expected)

    def meet(self, model: nn.Module) -> None:
        """Check, or note, what concerns ``model`` as a whole before it is touched. Default: nothing."""


def check_number(config: TunerConfig, field: str) -> None:
    """Raise :class:`ConfigError` unless ``field`` of ``config`` is a finite number."""
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(type(config).__name__, field, value, "expected a finite number")


def check_count(config: TunerConfig, field: str) -> None:
    """Raise :class:`ConfigError` unless ``field`` of ``config`` is an integer above 0."""
    value = getattr(config, field)
    if type(value) is not int or value < 1:
        raise ConfigError(type(config).__name__, field, value, "expected an integer above 0")


def check_choice(config: TunerConfig, field: str, options: Sequence[object]) -> None:
    """Raise :class:`ConfigError` unless ``field`` of ``config`` is one of ``options``."""
    value = getattr(config, field)
    if not any(value == option and type(value) is type(option) for option in options):
        expected = f"expected one of {', '.join(map(str, options))}"
        raise ConfigError(type(config).__name__, field, value, expected)


@dataclasses.dataclass
class BlockConfig(TunerConfig):
    """Which blocks a tuner adapts: the ``ffn`` of every layer, the self-``attention``, both, or the whole ``layer``.

    ``target_modules`` None finds them for the architectures of :data:`BLOCKS`; other models need it. ``placement`` is
    ``parallel`` (the adapter reads the block's input) or ``sequential`` (it reads its output); a method that has only
    one of them says so in ``placements``.
    """

    placements: ClassVar[tuple[str, ...]] = ("parallel", "sequential")

    blocks: list[str] = dataclasses.field(default_factory=lambda: ["ffn"])
    placement: str = "parallel"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blocks = list(self.blocks)
        if self.blocks != ["layer"] and (not self.blocks or not set(self.blocks) <= {"ffn", "attention"}):
            raise ConfigError(type(self).__name__, "blocks", self.blocks, "expected ffn, attention or both, or layer")
        check_choice(self, "placement", self.placements)
        if self.fused_parts is not None:
            raise ConfigError(type(self).__name__, "fused_parts", self.fused_parts, "a block has no fused parts")


class LinearMap(nn.Module):
    """Base of a linear layer that stores no matrix of its size, such as a product of factors.

    Adapters can be put beside it, but not merged into it. It sets ``in_features`` and ``out_features``; ``weight`` is
    one of its factors, from which PEFT reads device and dtype, and ``bias`` may be None.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer of any kind, also where its weight is partitioned."""
    if isinstance(module, LinearMap):
        return module.in_features, module.out_features
    return _get_in_out_features(module)


class Cell(nn.Module):
    """One adapter of one layer or block: a plain module that maps its (input, output) to the adapted output.

    A subclass takes ``(config, in_features, out_features)``, must not look at weights (under ZeRO-3 they are empty),
    and defines :meth:`forward`; one that adds a fixed matrix to the weight also defines :meth:`delta` and sets
    ``mergeable``. One that shares parameters over all layers defines :meth:`tie`.
    """

    mergeable: ClassVar[bool] = False
    #: whether what is added to the output depends on the output; False lets it be computed alone, in its own dtype
    reads_output: bool = True

    @classmethod
    def refusal(cls, config: Any, in_features: int, out_features: int) -> str:
        """Say why a layer of this size cannot be adapted and what would do; empty where it can."""
        return ""

    def delta(self) -> torch.Tensor:
        """What merging adds to ``nn.Linear.weight``, of shape (out_features, in_features)."""
        raise ModelError(f"{type(self).__name__} cannot be merged into a weight")

    def elementwise_macs(self) -> int:
        """Multiply-accumulates per token that are no matrix product, as its paper counts them. Default: none are."""
        return 0

    def tie(self, first: Cell) -> None:
        """Hold no parameters that all layers share, but read those of ``first``, the cell of the first layer.

        By reading from the cell, not from its parameter, sharing outlives whatever replaces that: loading, moving. By
        default nothing is shared.
        """

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Map the layer's input (..., in_features) and output (..., out_features) to the adapted output."""
        raise TypeError(f"{type(self).__name__} must define forward(x, y)")


class FusedCell(Cell):
    """A cell for each of some parts of a fused [query, key, value] projection of three times ``in_features``."""

    def __init__(self, cell_type: type[Cell], config: TunerConfig, in_features: int) -> None:
        super().__init__()
        assert config.fused_parts is not None
        cells = {name: cell_type(config, in_features, in_features) for name in FUSED if name in config.fused_parts}
        self.parts = nn.ModuleDict(cells)
        self.reads_output = any(cell.reads_output for cell in cells.values())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Adapt the parts of ``y`` (..., 3·in_features) that have a cell."""
        parts = zip(FUSED, y.chunk(len(FUSED), -1), strict=True)
        return torch.cat([self.parts[name](x, part) if name in self.parts else part for name, part in parts], -1)

    def delta(self) -> torch.Tensor:
        """The parts' deltas below each other, zero where a part has no cell."""
        deltas = {name: cell.delta() for name, cell in self.parts.items()}
        empty = torch.zeros_like(next(iter(deltas.values())))
        return torch.cat([deltas.get(name, empty) for name in FUSED])

    def elementwise_macs(self) -> int:
        """Those of all parts."""
        return sum(cell.elementwise_macs() for cell in self.parts.values())


class CellLayer(nn.Module, BaseTunerLayer):
    """A wrapped module with a cell for each adapter: what linear layers and blocks have in common."""

    cell_type: ClassVar[type[Cell]]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: TunerConfig, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = self._sizes()
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
        self.cells[adapter_name] = self._cell(config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``get_delta_weight`` says all that the adapter does."""
        return self.cell_type.mergeable

    def _sizes(self) -> tuple[int, int]:
        raise TypeError(f"{type(self).__name__} must define _sizes()")

    def _cell(self, config: TunerConfig) -> Cell:
        return self.cell_type(config, self.in_features, self.out_features)

    def _adapted(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y`` after each active cell."""
        cells = self.cells
        for name in self.active_adapters:
            if name in cells:
                y = self._adapt(cells[name], x, y)
        return y

    def _adapt(self, cell: Cell, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dtype = next(cell.parameters()).dtype
        if y.dtype == dtype or torch.is_autocast_enabled(x.device.type):
            return cell(x.to(dtype), y)
        if torch.promote_types(y.dtype, dtype) == dtype:
            return cell(x.to(dtype), y.to(dtype)).to(y.dtype)
        start = y.to(dtype) if cell.reads_output else torch.zeros_like(y, dtype=dtype)
        return y + (cell(x.to(dtype), start) - start).to(y.dtype)  # only what is added is rounded

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].removesuffix('_cell')}.{super().__repr__()}"


class Layer(CellLayer):
    """A linear layer (``nn.Linear``, transformers' ``Conv1D``, or quantised) with a cell for each adapter."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the base layer, then each active cell unless merged or disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        return y if self.disable_adapters or self.merged else self._adapted(x, y)

    def _sizes(self) -> tuple[int, int]:
        return linear_sizes(self.get_base_layer())

    def _cell(self, config: TunerConfig) -> Cell:
        return FusedCell(self.cell_type, config, self.in_features) if config.fused_parts else super()._cell(config)

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
                self.set_base_weight(self._sum(self.get_base_weight(), name, +1))
                self.merged_adapters.append(name)

    def try_merge(self, adapter_names: list[str]) -> None:
        """Compute what :meth:`merge` would write, and drop it; raise :class:`ModelError` where it would."""
        weight = self.get_base_weight()
        for name in adapter_names:
            weight = self._sum(weight, name, +1)

    def unmerge(self) -> None:
        """Take every merged delta out of the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("already unmerged: nothing to do", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.cells:
                self.set_base_weight(self._sum(self.get_base_weight(), name, -1))

    def _sum(self, weight: torch.Tensor, name: str, sign: int) -> torch.Tensor:
        delta = self.get_delta_weight(name).to(weight.device)
        merged = (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + sign * delta).to(weight.dtype)
        if not bool(merged.isfinite().all()):
            raise ModelError(f"merging adapter {name!r} gives NaN or infinite weights: refused")
        return merged


class BlockLayer(CellLayer):
    """A block (a feed-forward network, an attention) with a cell for each adapter; nothing of it can be merged.

    A block whose ``forward`` takes an ``input_tensor`` to add (BERT's output modules, which are the second half of a
    block) gets it adapted: it is the block's input, and it is added to the block's output. All other blocks get their
    output adapted, the first item of it where it is a tuple.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, and each active cell unless disabled."""
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if self._adds_its_input:
            if "input_tensor" in kwargs:
                x = kwargs.pop("input_tensor")
            else:
                first, x, *rest = args
                args = (first, *rest)
            return self.base_layer(*args, input_tensor=self._adapted(x, x), **kwargs)
        y = self.base_layer(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return (self._adapted(x, y[0]), *y[1:]) if isinstance(y, tuple) else self._adapted(x, y)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise :class:`ModelError`."""
        raise ModelError(f"{self.cell_type.__name__} works on a whole block and cannot be merged into its weights")

    def unmerge(self) -> None:
        """Nothing is ever merged."""
        warnings.warn("already unmerged: nothing to do", stacklevel=2)

    def _sizes(self) -> tuple[int, int]:
        block = self.get_base_layer()
        self._adds_its_input = adds_its_input(block)
        return block_sizes(block)

    def _cell(self, config: TunerConfig) -> Cell:
        assert isinstance(config, BlockConfig)
        return self.cell_type(config, *cell_sizes(self.get_base_layer(), config))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        weights = list(base_layer.parameters())
        floating = [weight.dtype for weight in weights if weight.is_floating_point()]
        return (weights[0].device if weights else None), (floating[0] if floating else None)

    def __getattr__(self, name: str) -> Any:
        """What the block has: models read attributes of their blocks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class Tuner(BaseTuner):
    """Puts a layer with cells around each targeted module; every refusal comes before the model is touched."""

    tuner_layer_cls: type[CellLayer]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: TunerConfig, model_config: dict[str, Any]) -> TunerConfig:
        known = self.target_module_mapping.get(model_config.get("model_type", ""))
        if peft_config.target_modules is None and known is None:
            raise ModelError(f"target_modules is needed for this architecture; {_linear_names(self.model)}")
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: TunerConfig, model: nn.Module) -> None:
        self._first: Cell | None = None
        peft_config.meet(model)
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
        linear = isinstance(base, (nn.Linear, Conv1D, LinearMap)) if backend is None else backend.layer_type == "linear"
        if not linear:
            raise ModelError(f"target module {name!r} is {type(base).__name__}: only linear layers can be adapted")
        if backend is None:
            check_weight(name, base.weight)
        size = linear_sizes(base)
        if config.fused_parts:
            if size[1] != len(FUSED) * size[0]:
                raise ModelError(
                    f"fused_parts: {name!r} ({size[0]} -> {size[1]}) is no fused query, key and value projection, "
                    "whose out_features are three times its in_features: target another module, or do without"
                )
            size = size[0], size[0]
        self._check_size(config, name, size)

    def _check_size(self, config: TunerConfig, name: str, size: tuple[int, int]) -> None:
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
            self._tie(target.cells[adapter_name])
            return
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        self._tie(layer.cells[adapter_name])

    def _tie(self, cell: Cell) -> None:
        """Let ``cell`` share what it shares with the first one of its adapter."""
        if self._first is None:
            object.__setattr__(self, "_first", cell)  # not as a submodule: it has its place in the model
        else:
            cell.tie(self._first)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the adapters (default: the active ones) to the weights of their layers: to all, or, refused, to none."""
        self.check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise :class:`ModelError` where one of the adapters (default: the active ones) cannot be merged.

        Every layer is looked at before the first is touched, so that a model is never left half merged.
        """
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)]
        shared = shared_weights(self.model)
        for name, layer in layers:
            self._check_mergeable(name, layer, shared)
        for name, layer in layers:
            asked = layer.active_adapters if adapter_names is None else adapter_names
            with onload_layer(layer):
                self._check_finite(name, layer, [key for key in asked if key in layer.cells])

    def _check_mergeable(self, name: str, layer: CellLayer, shared: dict[int, list[str]]) -> None:
        if not layer.cell_type.mergeable:
            raise ModelError(
                f"{layer.cell_type.__name__} at {name!r} cannot be merged: use the model as it is, or unload()"
            )
        if isinstance(layer.get_base_layer(), LinearMap):
            raise ModelError(f"{name!r} stores no matrix that an adapter could be merged into: use the model as it is")
        refuse_shared(name, layer.get_base_layer(), shared)

    def _check_finite(self, name: str, layer: CellLayer, adapters: list[str]) -> None:
        for adapter in adapters:
            if not all(bool(p.isfinite().all()) for p in layer.cells[adapter].parameters()):
                raise ModelError(f"adapter {adapter!r} at {name!r} holds NaN or infinite weights: nothing was merged")
        assert isinstance(layer, Layer)
        try:
            layer.try_merge([adapter for adapter in adapters if adapter not in layer.merged_adapters])
        except ModelError as error:
            raise ModelError(f"{name!r}: {error}, nothing was merged") from error

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        head, found, tail = key.rpartition(f"{container}{adapter_name}.")
        return f"{head}{container}{tail}" if found else super()._remove_adapter_name_from_key(key, adapter_name)


_DECODER = {"ffn": "mlp", "attention": "self_attn", "layer": r"layers\.\d+"}
_T5 = {"ffn": "DenseReluDense", "attention": "SelfAttention", "layer": r"block\.\d+"}
#: regular expressions of the names of whole blocks, by the architecture's ``model_type``
BLOCKS = {
    "gpt2": {"ffn": "mlp", "attention": "attn", "layer": r"h\.\d+"},
    "llama": _DECODER,
    "mistral": _DECODER,
    "mt5": _T5,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "t5": _T5,
    "umt5": _T5,
    "vit": {"ffn": "mlp", "attention": "attention", "layer": r"layers\.\d+"},
}
#: encoders whose blocks are two modules each, the second of which normalises the sum of the block's input and output
SPLIT_BLOCKS = ("bert", "roberta", "xlm-roberta", "electra")


def block_pattern(model_type: str, config: BlockConfig) -> str | None:
    """The regular expression of the modules to wrap; None for an architecture that is not known."""
    known = BLOCKS.get(model_type)
    if model_type in SPLIT_BLOCKS:
        layer, inside = r"layer\.\d+", "" if config.placement == "parallel" else r"\.dense"
        known = {
            "ffn": rf"{layer}\.output{inside}",
            "attention": rf"{layer}\.attention\.output{inside}",
            "layer": layer,
        }
    if known is None:
        return None
    names = "|".join(known[block] for block in config.blocks)
    return rf"{_first_number(config.layers_to_transform)}(?:.*\.)?(?:{names})"


def _first_number(wanted: list[int] | int | None) -> str:
    """What, before a regular expression of names, keeps to those whose first number (the layer's) is ``wanted``."""
    if wanted is None:
        return ""
    numbers = "|".join(map(str, [wanted] if isinstance(wanted, int) else wanted))
    return rf"(?=(?:(?!\d+\b)[^.]+\.)*(?:{numbers})(?:\.|$))"


def adds_its_input(block: nn.Module) -> bool:
    """Whether ``block`` is the second half of a block, which adds the whole block's input and normalises the sum."""
    return "input_tensor" in inspect.signature(type(block).forward).parameters


def block_sizes(block: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a block: those of its first linear layer and of its last."""
    linear = [m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D)) or hasattr(m, "in_features")]
    if not linear:
        raise ModelError(f"{type(block).__name__} holds no linear layer: it is no block that can be adapted")
    sizes = linear_sizes(linear[0])[0], linear_sizes(linear[-1])[1]
    return (sizes[1], sizes[1]) if adds_its_input(block) else sizes


def cell_sizes(block: nn.Module, config: BlockConfig) -> tuple[int, int]:
    """(in_features, out_features) of a cell: as wide on both sides as the block's output where it reads that."""
    sizes = block_sizes(block)
    return (sizes[1], sizes[1]) if config.placement == "sequential" else sizes


class BlockTuner(Tuner):
    """Puts a :class:`BlockLayer` around each targeted block."""

    def _prepare_adapter_config(self, peft_config: BlockConfig, model_config: dict[str, Any]) -> BlockConfig:
        if peft_config.target_modules is None:
            kind = model_config.get("model_type", "")
            peft_config.target_modules = block_pattern(kind, peft_config)
            if peft_config.target_modules is None:
                known = ", ".join(sorted([*BLOCKS, *SPLIT_BLOCKS]))
                raise ModelError(
                    f"the blocks of the architecture {kind or '(unnamed)'!r} are not known (known: {known}); "
                    'give target_modules the name of its feed-forward block, such as "mlp"'
                )
            peft_config.layers_to_transform = None  # the pattern says it
        return peft_config

    def _check_target(self, config: TunerConfig, name: str, module: nn.Module) -> None:
        block = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        assert isinstance(config, BlockConfig)
        if config.placement == "sequential" and adds_its_input(block):
            raise ModelError(
                f"{name!r} ({type(block).__name__}) gives a normalised sum, not the block's output: "
                f"for a sequential adapter target {name + '.dense'!r}"
            )
        for inner, part in block.named_modules(prefix=name):
            if resolve_quantization_backend(part, **get_quantization_kwargs(self)) is None:
                for kind, parameter in part.named_parameters(recurse=False):
                    check_weight(f"{inner}.{kind}".removesuffix(".weight"), parameter)
        self._check_size(config, name, cell_sizes(block, config))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raise :class:`ModelError` for a weight that no adapter can be trained beside: not floating, or not finite."""
    if not weight.is_floating_point():
        raise ModelError(
            f"{name}.weight is {weight.dtype}: load the model in a floating dtype, or quantised by PEFT's rules"
        )
    if weight.device.type != "meta" and not bool(weight.isfinite().all()):
        raise ModelError(f"{name}.weight holds NaN or infinite values: the model cannot be adapted")


def base_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Names and modules of ``model`` without the adapters in it; a wrapped layer counts as the layer inside."""
    if isinstance(model, BaseTunerLayer):
        return base_modules(model.base_layer, f"{prefix}.base_layer")
    found = [(prefix, model)]
    for name, child in model.named_children():
        found += base_modules(child, f"{prefix}.{name}" if prefix else name)
    return found


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """The names of each weight that several modules of ``model`` hold, by its identity."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(prefix=name, recurse=False):
            found.setdefault(id(parameter), []).append(kind)
    return {key: names for key, names in found.items() if len(names) > 1}


def refuse_shared(name: str, layer: nn.Module, shared: dict[int, list[str]]) -> None:
    """Raise :class:`ModelError` where merging into the weight of ``layer`` would change that of another module."""
    names = shared.get(id(getattr(layer, "weight", None)), [])
    others = [other for other in names if not other.startswith(f"{name}.")]
    if others:
        raise ModelError(
            f"{name!r} shares its weight with {', '.join(others)}: merging would change that too; untie the weights "
            "(tie_word_embeddings=False), or target other modules"
        )


def _names_outside_tuners(model: nn.Module) -> list[str]:
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name, _ in model.named_modules() if not name.startswith(layers)]


def _linear_names(model: nn.Module, wanted: str = "") -> str:
    linear = (nn.Linear, Conv1D, LinearMap, BaseTunerLayer)
    modules = [(name, model.get_submodule(name)) for name in _names_outside_tuners(model)]
    return suggest(wanted, {name.rpartition(".")[2] for name, module in modules if isinstance(module, linear)})


def _plain(names: Any) -> Any:
    return sorted(names) if isinstance(names, set) else names
