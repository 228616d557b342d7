"""How a method from outside becomes one of PEFT's: the only file that changes anything in PEFT.

PEFT has no official way to add a method. :func:`add_member` extends its ``PeftType`` enumeration, and
:func:`_refuse_stacked_unload` closes one hole: ``merge_and_unload`` drops, without a word, a tuner that lies below
another one on the same layer. Nothing else of PEFT is changed.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method

from pareto_adapters._peft import Cell, Layer, Tuner, TunerConfig
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


def register(config_type: type[TunerConfig], cell_type: type[Cell]) -> tuple[type[Layer], type[Tuner]]:
    """Make a PEFT method of a configuration and a cell; return its layer and tuner classes.

    ``KronAConfig`` gives ``KronALayer`` and ``KronATuner``: assign them under these names in the calling module, so
    that models can be pickled. Registering the same configuration again (a reloaded module) replaces it.
    """
    name, stem = config_type.peft_name, config_type.__name__.removesuffix("Config")
    where = {"__module__": config_type.__module__}
    layer = type(f"{stem}Layer", (Layer,), {"adapter_layer_names": (f"{name}_cell",), "cell_type": cell_type, **where})
    tuner = type(f"{stem}Tuner", (Tuner,), {"prefix": f"{name}_", "tuner_layer_cls": layer, **where})
    member = add_member(PeftType, name.upper())
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and (known.__module__, known.__name__) != (config_type.__module__, config_type.__name__):
        raise ModelError(f"PEFT already has a method {name!r}, of {known.__module__}: it cannot be registered again")
    for registry in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING):
        registry.pop(member, None)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(member, None)
    register_peft_method(name=name, config_cls=config_type, model_cls=tuner)
    _refuse_stacked_unload()
    return layer, tuner


def _refuse_stacked_unload() -> None:
    """Make ``merge_and_unload`` raise where one of our layers lies above or below another tuner's, once per process."""
    original = BaseTuner._unload_and_optionally_merge
    if getattr(original, "refuses_stacked", False):
        return

    @functools.wraps(original)
    def checked(self: BaseTuner, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        for name, module in self.model.named_modules() if merge else ():
            inner = getattr(module, "base_layer", None)
            if isinstance(inner, BaseTunerLayer) and (isinstance(module, Layer) or isinstance(inner, Layer)):
                kinds = f"{type(module).__name__} over {type(inner).__name__}"
                raise ModelError(
                    f"two tuners on {name!r} ({kinds}): merge_and_unload would drop the inner one; "
                    "call merge_adapter() and then unload(), nothing was changed"
                )
        return original(self, merge, *args, **kwargs)

    checked.refuses_stacked = True
    BaseTuner._unload_and_optionally_merge = checked
