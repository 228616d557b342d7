"""How a method from outside becomes one of PEFT's: the only file that changes anything in PEFT.

PEFT has no official way to add a method. :func:`add_member` extends its ``PeftType`` enumeration. Two holes are closed,
where PEFT says nothing: :func:`_refuse_stacked_unload`, since unloading drops a tuner that lies below another one, and
:func:`_refuse_targets_inside_blocks`, since layers inside a wrapped block are passed over when another adapter is
added. Nothing else of PEFT is changed.
"""

from __future__ import annotations

import copy
import enum
import functools
from typing import Any

from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import PeftType, register_peft_method
from torch import nn

from pareto_adapters._peft import BlockConfig, BlockLayer, BlockTuner, Cell, CellLayer, Layer, Tuner, TunerConfig
from pareto_core import ModelError


def add_member(kind: type[enum.Enum], name: str) -> Any:
    """Return the member ``name`` of a string enumeration, adding it (with its name as value) where it is missing.

    The three private maps are all that look-up by name and by value, iteration, pickling and deep copies need, in
    Python 3.11 to 3.13.
    """
    if name in kind.__members__:
        return kind[name]
    member = str.__new__(kind, name)
    member._name_, member._value_, member.__objclass__ = name, name, kind
    member._sort_order_ = len(kind)
    type.__setattr__(kind, name, member)
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[name] = member
    return member


def register(config_type: type[TunerConfig], cell_type: type[Cell]) -> tuple[type[CellLayer], type[Tuner]]:
    """Make a PEFT method of a configuration and a cell; return its layer and tuner classes.

    A :class:`~pareto_adapters._peft.BlockConfig` gives a tuner of whole blocks, any other one of linear layers.

    ``KronAConfig`` gives ``KronALayer`` and ``KronATuner``: assign them under these names in the calling module, so
    that models can be pickled. Registering the same configuration again (a reloaded module) replaces it.
    """
    name, stem = config_type.peft_name, config_type.__name__.removesuffix("Config")
    where = {"__module__": config_type.__module__}
    blocks = issubclass(config_type, BlockConfig)
    attributes = {"adapter_layer_names": (f"{name}_cell",), "cell_type": cell_type, **where}
    layer = type(f"{stem}Layer", (BlockLayer if blocks else Layer,), attributes)
    attributes = {"prefix": f"{name}_", "tuner_layer_cls": layer, **where}
    tuner = type(f"{stem}Tuner", (BlockTuner if blocks else Tuner,), attributes)
    member = add_member(PeftType, name.upper())
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and (known.__module__, known.__name__) != (config_type.__module__, config_type.__name__):
        raise ModelError(f"PEFT already has a method {name!r}, of {known.__module__}: it cannot be registered again")
    for registry in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING):
        registry.pop(member, None)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(member, None)
    register_peft_method(name=name, config_cls=config_type, model_cls=tuner)
    _refuse_stacked_unload()
    _refuse_targets_inside_blocks()
    return layer, tuner


def _refuse_stacked_unload() -> None:
    """Make unloading raise where it would lose or leave a tuner below one of our layers, once per process."""
    original = BaseTuner._unload_and_optionally_merge
    if getattr(original, "refuses_stacked", False):
        return

    @functools.wraps(original)
    def checked(
        self: BaseTuner,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        for name, module in self.model.named_modules():
            inner = getattr(module, "base_layer", None) if isinstance(module, BaseTunerLayer) else None
            ours = isinstance(module, CellLayer) or isinstance(inner, CellLayer)
            if ours and isinstance(inner, BaseTunerLayer) and (merge or not inner.merged):
                kinds = f"{type(module).__name__} over {type(inner).__name__}"
                raise ModelError(
                    f"two tuners on {name!r} ({kinds}): {'merge_and_unload' if merge else 'unload'} would drop the "
                    "inner one; call merge_adapter() and then unload(), nothing was changed"
                )
            if isinstance(module, BlockLayer):
                inside = [type(m).__name__ for m in inner.modules() if isinstance(m, BaseTunerLayer)] if inner else []
                if inside:
                    raise ModelError(
                        f"{type(module).__name__} at {name!r} is around a block that holds {inside[0]}: unloading "
                        "would leave that behind; unload (or merge) the inner tuner before the outer one is added"
                    )
        if merge and isinstance(self, Tuner):
            self.check_merge(adapter_names)
        return original(self, merge, progressbar, safe_merge, adapter_names)

    checked.refuses_stacked = True
    BaseTuner._unload_and_optionally_merge = checked


def _refuse_targets_inside_blocks() -> None:
    """Make adding any adapter raise where it targets a layer inside one of our wrapped blocks, once per process."""
    original = BaseTuner.inject_adapter
    if getattr(original, "refuses_inside_blocks", False):
        return

    @functools.wraps(original)
    def checked(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, BlockLayer)]
        if blocks:
            config = copy.deepcopy(self.peft_config[adapter_name])
            config = self._prepare_adapter_config(config, self.get_model_config(model))
            config = _maybe_include_all_linear_layers(config, model)
            for name, block in blocks:
                _check_outside(self, config, name, block)
        original(self, model, adapter_name, *args, **kwargs)

    checked.refuses_inside_blocks = True
    BaseTuner.inject_adapter = checked


def _check_outside(tuner: BaseTuner, config: Any, name: str, block: BlockLayer) -> None:
    for inner, _ in block.base_layer.named_modules():
        path = f"{name}.{inner}"
        if inner and tuner._check_target_module_exists(config, path):
            raise ModelError(
                f"target module {path!r} lies inside a block that {type(block).__name__} wraps, where PEFT would pass "
                "it over; add this adapter before the one of the block, or leave the block out by exclude_modules"
            )
