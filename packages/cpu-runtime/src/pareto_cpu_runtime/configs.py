"""The configs in a model's directory, read without trust: what they ask for must be what the files hold.

A config is checked against the shapes of the tensors before transformers sees it, so that no damaged or altered number
makes anybody allocate, or loop, for a model that is not there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core.errors import ConfigError, DataError, ModelError, shown
from pareto_cpu_runtime.families import FAMILIES, describe

if TYPE_CHECKING:
    from pareto_cpu_runtime.families.description import Decoder

CONFIG, GENERATION = "config.json", "generation_config.json"
Shapes = Mapping[str, tuple[int, ...]]
#: what model types call the number of their blocks, and the sizes that some tensor must be as large as
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers")
_SIZES = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_hidden_size"),
    *("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads", "head_dim"),
)
_NUMBERED = re.compile(r"(.*?\.)(\d+)\.")


def read_config(directory: Path, shapes: Shapes) -> Any:
    """The transformers config of ``directory``; ``shapes`` are those of its weights, by name (packed ones unpacked).

    Raises :class:`DataError` with the file's name where it is missing, damaged, or asks for what ``shapes`` do not
    hold. Architectures that the runtime has not are not looked at further than the number of their blocks.
    """
    from transformers import AutoConfig

    path = directory / CONFIG
    values = read_json(path)
    check_sizes(path, values, shapes)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' checks of a config raise whatever its classes do
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {shown(str(error))})") from error
    if getattr(config, "model_type", None) in FAMILIES:
        try:
            _check_blocks(path, describe(config), shapes)
        except (ConfigError, ModelError) as error:
            raise DataError(f"{path}: {error}") from error
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises :class:`DataError` with its name where there is none."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"no {path.name} in {path.parent}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a {type(values).__name__}, expected an object of fields")
    return values


def check_sizes(path: Path, values: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise :class:`DataError` for more blocks than tensors, or a size above the largest dimension of any."""
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    known = str(values.get("model_type")) in FAMILIES
    limits = dict.fromkeys(_BLOCKS, len(shapes)) | (dict.fromkeys(_SIZES, largest) if known else {})
    for field, most in limits.items():
        value = values.get(field)
        if isinstance(value, (int, float)) and not 1 <= value <= most:
            raise DataError(f"{path}: {field} = {shown(value)}: the weights allow 1 to {most}")


def _check_blocks(path: Path, decoder: Decoder, shapes: Shapes) -> None:
    """As many blocks as there are weights of, and a weight for every module."""
    matched = _NUMBERED.match(decoder.blocks[0].out.parts[0].module)
    assert matched is not None
    prefix = matched[1]
    held = {matched[2] for name in shapes if (matched := _NUMBERED.match(name)) and matched[1] == prefix}
    if len(held) != len(decoder.blocks):
        raise DataError(f"{path} asks for {len(decoder.blocks)} blocks, there are weights of {len(held)}")
    modules = set(decoder.modules()) - {part.module for part in decoder.head.parts}  # the head may be the embedding
    missing = sorted(module for module in modules if f"{module}.weight" not in shapes)
    if missing:
        raise DataError(f"{path} asks for {missing[0]}.weight, which the weights do not hold")


def read_generation_config(directory: Path, config: Any) -> Any:
    """The generation config of ``directory``, or what transformers makes of ``config`` where there is no such file.

    Raises :class:`DataError` with the file's name where it cannot be read or a token in it is not a number.
    """
    from transformers import GenerationConfig

    path = directory / GENERATION
    kept = path if path.exists() else directory / CONFIG
    try:
        if kept is path:
            found = GenerationConfig.from_pretrained(directory, local_files_only=True)
        else:
            found = generation_config_of(config)
    except Exception as error:  # as for the config
        raise DataError(f"{kept} cannot be read ({type(error).__name__}: {shown(str(error))})") from error
    for field in ("eos_token_id", "pad_token_id"):
        value = getattr(found, field)
        tokens = value if isinstance(value, list) and field == "eos_token_id" else [0 if value is None else value]
        if not all(type(token) is int for token in tokens):
            raise DataError(f"{kept}: {field} = {shown(value)}: expected the number of a token")
    return found


def generation_config_of(config: Any, given: Any = None) -> Any:
    """``given``, or the generation config that transformers makes of a model's own config, with its ends of text."""
    if given is not None:
        return given
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(config)
