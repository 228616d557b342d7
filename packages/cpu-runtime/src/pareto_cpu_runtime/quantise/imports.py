"""Models that others quantised: the GPTQ and AWQ layouts of safetensors, read without their libraries.

Both hold, per operator of n outputs and k inputs, ``scales`` (groups, n) and, as int32 with 32 / bits codes each,
``qweight`` and ``qzeros``. W = scales * (code - zero).

* GPTQ: ``qweight`` (k * bits / 32, n), codes of neighbouring inputs in an int32, lowest bits first; ``qzeros``
  (groups, n * bits / 32) holds zero - 1, in the format called ``gptq_v2`` the zero itself. ``g_idx`` (k,) names each
  input's group; only groups of neighbouring inputs can be packed for the runtime.
* AWQ ("gemm"): ``qweight`` (k, n / 8), outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight in an int32, ``qzeros`` likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pareto_core.errors import DataError, ModelError, UnsupportedError
from pareto_cpu_runtime.configs import CONFIG, check_sizes, read_generation_config, read_json
from pareto_cpu_runtime.families import model_name
from pareto_cpu_runtime.quantise.grid import code_range, multiplier_of
from pareto_cpu_runtime.quantise.matrix import Matrices, QuantisedLinear, QuantisedModel
from pareto_cpu_runtime.quantise.operators import output_embedding
from pareto_cpu_runtime.quantise.restore import model_class
from pareto_cpu_runtime.tensor_file import map_tensors

#: where the outputs of eight lie in an int32 of AWQ, lowest bits first
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
Tensors = dict[str, torch.Tensor]


def import_gptq(directory: Path) -> QuantisedModel:
    """Read a model in GPTQ's layout; 4 and 8 bits.

    Raises :class:`DataError` where files are missing or do not fit, :class:`UnsupportedError` for other widths and for
    groups of inputs that are not neighbours (``desc_act``).
    """
    return _import(Path(directory), "gptq", _gptq_matrix)


def import_awq(directory: Path) -> QuantisedModel:
    """Read a model in AWQ's "gemm" layout, 4 bits. Raises as :func:`import_gptq`."""
    return _import(Path(directory), "awq", _awq_matrix)


def _import(
    directory: Path, method: str, matrix_of: Callable[[str, Tensors, dict[str, Any]], QuantisedLinear]
) -> QuantisedModel:
    values = _config(directory, method)
    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        named = map_tensors(path).items()
        tensors.update({model_name(str(values.get("model_type")), name): tensor for name, tensor in named})
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not names:
        raise DataError(f"{directory} holds no safetensors with a quantised operator (*.qweight)")
    config, architecture = _architecture(directory / CONFIG, values, tensors)
    recipe = values["quantization_config"]
    matrices = Matrices()
    for name in names:
        parts = {part: tensors.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in tensors}
        try:
            matrices[name] = matrix_of(name, parts, recipe)
            matrices[name].check(name)
        except (ModelError, RuntimeError, KeyError) as error:
            raise DataError(f"{directory}: the tensors of {name} do not fit each other: {error}") from error
    _share_head(config, architecture, matrices, tensors)
    origin = {"imported": method, **recipe}
    generation = read_generation_config(directory, config)
    return QuantisedModel(config, architecture, matrices, tensors, (), origin, generation)


def _architecture(path: Path, values: dict[str, Any], tensors: Tensors) -> tuple[Any, str]:
    """The model's config and the name of its class."""
    from transformers import AutoConfig

    check_sizes(path, values, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    fields = {name: value for name, value in values.items() if name != "quantization_config"}
    try:
        architecture = str((fields.get("architectures") or [None])[0])
        model_class(architecture)
        return AutoConfig.for_model(**fields), architecture
    except Exception as error:  # transformers' checks of a config raise whatever its classes do
        reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path} cannot be read: {reason}") from error


def _config(directory: Path, method: str) -> dict[str, Any]:
    path = directory / CONFIG
    values = read_json(path)
    try:
        recipe = dict(values["quantization_config"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} does not describe a quantised model ({type(error).__name__}: {error})") from error
    if recipe.get("quant_method") != method:
        raise DataError(f"{path}: quant_method is {recipe.get('quant_method')!r}, expected {method!r}")
    bits = recipe.get("bits")
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        raise UnsupportedError(f"{path}: {method} with {bits!r} bits cannot be imported: 4 bits can, and 8 of GPTQ")
    if method == "awq" and str(recipe.get("version", "gemm")).lower() != "gemm":
        raise UnsupportedError(f'{path}: AWQ version {recipe["version"]!r} cannot be imported: "gemm" can')
    values["quantization_config"] = recipe
    return values


def _gptq_matrix(name: str, parts: Tensors, recipe: dict[str, Any]) -> QuantisedLinear:
    bits = recipe["bits"]
    codes = _unpacked(parts["qweight"].t(), bits)
    zeros = _unpacked(parts["qzeros"], bits)
    if recipe.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)  # a zero of 0 is stored as -1, all bits set
    return _matrix(name, codes, parts["scales"].t(), zeros.t(), parts.get("g_idx"), bits)


def _awq_matrix(name: str, parts: Tensors, recipe: dict[str, Any]) -> QuantisedLinear:
    place = torch.argsort(torch.tensor(_AWQ_ORDER))
    codes, zeros = (
        _unpacked(parts[part], 4).view(len(parts[part]), -1, 8)[:, :, place].flatten(1).t()
        for part in ("qweight", "qzeros")
    )
    return _matrix(name, codes, parts["scales"].t(), zeros, None, recipe["bits"])


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int32 (rows, columns * 32 / bits) of int32 (rows, columns), lowest bits first."""
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise ModelError(f"packed codes must be int32 in two dimensions, not {packed.dtype} {list(packed.shape)}")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)


def _matrix(
    name: str, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor | None, bits: int
) -> QuantisedLinear:
    k, groups = codes.shape[1], scales.shape[1]
    if groups < 1 or k % groups != 0:
        raise ModelError(f"{groups} groups do not divide {k} inputs")
    group = k // groups
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(k) // group):
        raise UnsupportedError(f"{name}: inputs of a group are not neighbours (desc_act): the runtime cannot pack them")
    multiplier = multiplier_of(float(scales.float().abs().max()))
    stored = (scales.float() / multiplier).half().contiguous()
    middle = 2 ** (bits - 1)
    kept = None if bool((zeros == middle).all()) else zeros.to(torch.uint8).contiguous()
    low, high = code_range(bits, kept is None)
    assert low == 0
    assert high == 2**bits - 1
    return QuantisedLinear(codes.to(torch.uint8).contiguous(), stored, kept, multiplier, group, bits)


def _share_head(config: Any, architecture: str, matrices: Matrices, tensors: Tensors) -> None:
    """Give an output embedding that is one with the input's, and so not in the file, its tensor."""
    with torch.device("meta"):
        model = model_class(architecture)(config)
    head = output_embedding(model)
    if head is None or head in matrices or f"{head}.weight" in tensors:
        return
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if f"{name}.weight" in tensors:
        tensors[f"{head}.weight"] = tensors[f"{name}.weight"]
