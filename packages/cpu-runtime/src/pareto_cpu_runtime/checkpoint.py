"""Packed models on disk: what the runtime maps into memory, and what any machine turns back into plain torch.

A directory with

* ``config.json`` and ``generation_config.json``: the transformers configurations of the source model;
* ``pareto_cpu_runtime.json``: the format's version, the shape and precision of each packed matrix, the recipe, the
  size of the tensors' file, and the sha256 of every file and of itself;
* ``model.safetensors``: each quantised matrix as one uint8 tensor ``<module>.packed`` in the panel layout of
  ``native/packed.h``, all other tensors in their dtype under their own names.

A file that is truncated, altered or of another version raises :class:`DataError` with its name. Each file is put in
its place whole, the manifest last: who reads while a model is written gets one model or an error, and who has one
mapped keeps it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pareto_core.errors import DataError, ModelError
from pareto_cpu_runtime import panels
from pareto_cpu_runtime.configs import (
    CONFIG,
    GENERATION,
    generation_config_of,
    read_config,
    read_generation_config,
)
from pareto_cpu_runtime.manifest import FORMAT_VERSION, MANIFEST, TENSORS, Manifest, PackedMatrix, read_manifest, seal
from pareto_cpu_runtime.quantise.fusion import Fusion, fuse, split
from pareto_cpu_runtime.quantise.matrix import Matrices, QuantisedLinear, QuantisedModel
from pareto_cpu_runtime.quantise.restore import build_model
from pareto_cpu_runtime.tensor_file import Pending, map_open, staged, write_tensors

SUFFIX = ".packed"


@dataclasses.dataclass(frozen=True)
class PackedModel:
    """A mapped packed model: nothing is read before it is touched.

    ``matrices`` says how each packed matrix lies, ``panels(name)`` gives its bytes, ``tensors`` the others by name.
    """

    directory: Path
    config: Any
    generation_config: Any
    manifest: Manifest
    packed: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]

    @property
    def architecture(self) -> str:
        """Name of the model's class in transformers."""
        return self.manifest.architecture

    @property
    def matrices(self) -> Mapping[str, PackedMatrix]:
        """Shape and precision of each packed matrix."""
        return self.manifest.matrices

    @property
    def weight_bytes(self) -> int:
        """Bytes of the file: codes, scales and the other tensors."""
        return self.manifest.file_bytes

    def panels(self, name: str) -> torch.Tensor:
        """The panels of the matrix ``name``, uint8 (bytes,), a view of the file."""
        return self.packed[name]

    def linear(self, name: str) -> QuantisedLinear:
        """Unpack the matrix ``name``."""
        entry = self.matrices[name]
        codes, scales, zeros = panels.unpack(
            self.packed[name].numpy(), entry.n, entry.k, entry.group, entry.store_bits, entry.asymmetric
        )
        kept = None if zeros is None else torch.from_numpy(zeros)
        parts = torch.from_numpy(codes), torch.from_numpy(scales), kept
        return QuantisedLinear(*parts, entry.multiplier, entry.group, entry.bits)

    def linears(self) -> Matrices:
        """Unpack every matrix under the name of its module, fused ones split."""
        found = Matrices()
        for name, entry in self.matrices.items():
            matrix = self.linear(name)
            parts = split(matrix, entry.rows, entry.order) if entry.modules else [matrix]
            found.update(zip(entry.modules or (name,), parts, strict=True))
        return found


def save_packed(model: QuantisedModel, directory: Path, fusions: Sequence[Fusion] = ()) -> None:
    """Write ``model`` to ``directory``, which is made if needed; matrices that ``fusions`` name are stored as one.

    A fusion whose matrices differ in precision, or of which one was left out, is stored apart.
    """
    source = model.config, model.architecture, model.matrices, model.tensors
    write_packed(directory, *source, fusions, model.left_out, model.recipe, model.generation_config)


def write_packed(
    directory: Path,
    config: Any,
    architecture: str,
    matrices: Mapping[str, QuantisedLinear],
    tensors: Mapping[str, torch.Tensor],
    fusions: Sequence[Fusion] = (),
    left_out: Sequence[str] = (),
    recipe: Mapping[str, Any] | None = None,
    generation_config: Any = None,
) -> None:
    """Write a packed model matrix by matrix: no more than one is packed at a time.

    ``generation_config`` None is what transformers makes of ``config``. A model that lies in ``directory`` already may
    be in use, and may be where ``matrices`` and ``tensors`` come from; it stays whole until this one is.

    Raises :class:`ModelError` naming a matrix whose scales are not finite or whose codes do not fit.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    entries, pending = _plan(matrices, fusions)
    first_of, shared = _shared(tensors)
    for name in sorted(first_of.values(), key=lambda name: -tensors[name].element_size()):
        tensor = tensors[name]
        pending[name] = Pending(tensor.dtype, tuple(tensor.shape), functools.partial(tensors.__getitem__, name))
    configs = {
        CONFIG: _config_text(config, architecture),
        GENERATION: generation_config_of(config, generation_config).to_json_string(),
    }
    size, digest = write_tensors(directory / TENSORS, pending)
    for name, text in configs.items():
        _write_text(directory / name, text)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        architecture=architecture,
        matrices=entries,
        shared=shared,
        left_out=tuple(left_out),
        recipe=dict(recipe or {}),
        file_bytes=size,
        file_sha256=digest,
        configs={name: hashlib.sha256(text.encode()).hexdigest() for name, text in configs.items()},
        sha256="",
    )
    values = manifest.to_json()
    _write_text(directory / MANIFEST, json.dumps({**values, "sha256": seal(values)}, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    with staged(path) as part:
        part.write_bytes(text.encode())


def copy_packed(source: Path, directory: Path) -> None:
    """Copy the files of a packed directory to another, which is made if needed and may hold a model that is in use."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == MANIFEST):
        with staged(directory / path.name) as part:
            shutil.copyfile(path, part)


def _plan(
    matrices: Mapping[str, QuantisedLinear], fusions: Sequence[Fusion]
) -> tuple[dict[str, PackedMatrix], dict[str, Pending]]:
    """What is written as which matrix: the first of a fusion's modules stands for all of them."""
    by_module = {module: fusion for fusion in fusions for module in fusion.modules if _fusable(matrices, fusion)}
    entries: dict[str, PackedMatrix] = {}
    pending: dict[str, Pending] = {}
    for name in matrices:
        fusion = by_module.get(name)
        parts = [matrices[module] for module in (fusion.modules if fusion else [name])]
        target = fusion.name if fusion else name
        if target in entries:
            continue
        n, first = sum(part.shape[0] for part in parts), parts[0]
        entries[target] = PackedMatrix(
            n=n,
            k=first.shape[1],
            group=first.group,
            bits=first.bits,
            asymmetric=not first.symmetric,
            multiplier=max(part.multiplier for part in parts),
            modules=fusion.modules if fusion else (),
            rows=tuple(part.shape[0] for part in parts) if fusion else (),
            order=fusion.order if fusion else "concat",
        )
        make = functools.partial(_packed, matrices, target, entries[target])
        pending[target + SUFFIX] = Pending(torch.uint8, (entries[target].bytes,), make)
    return entries, pending


def _fusable(matrices: Mapping[str, QuantisedLinear], fusion: Fusion) -> bool:
    if not all(module in matrices for module in fusion.modules):
        return False
    try:
        fuse([matrices[module] for module in fusion.modules], fusion.order)
    except ModelError:
        return False
    return True


def _packed(matrices: Mapping[str, QuantisedLinear], name: str, entry: PackedMatrix) -> torch.Tensor:
    parts = [matrices[module] for module in entry.modules or (name,)]
    matrix = fuse(parts, entry.order) if entry.modules else parts[0]
    matrix.check(name)
    return pack_matrix(matrix)


def pack_matrix(matrix: QuantisedLinear) -> torch.Tensor:
    """Return the panels of a matrix, uint8 (bytes,); by the native module where it is built."""
    codes, scales = matrix.codes.contiguous().numpy(), matrix.scales.contiguous().numpy()
    zeros = None if matrix.zeros is None else matrix.zeros.contiguous().numpy()
    try:
        from pareto_cpu_runtime import _native
    except ImportError:
        return torch.from_numpy(panels.pack(codes, scales, zeros, matrix.store_bits))
    n, k = matrix.shape
    out = np.empty(panels.packed_bytes(n, k, matrix.group, matrix.store_bits, zeros is not None), np.uint8)
    _native.pack(codes, scales.view(np.uint16), zeros, matrix.store_bits, out)
    return torch.from_numpy(out)


def _shared(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[Any, str], dict[str, str]]:
    """The first name of each storage, and the names that are one with another."""
    first_of: dict[Any, str] = {}
    shared = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        first = first_of.setdefault(key, name)
        if first != name:
            shared[name] = first
    return first_of, shared


def _config_text(config: Any, architecture: str) -> str:
    values = config.to_dict()
    values["architectures"] = [architecture]
    return json.dumps(values, indent=1, default=str) + "\n"


def load_packed(directory: Path, check: bool = True) -> PackedModel:
    """Map the packed model in ``directory``.

    ``check`` reads the file once, to compare its sha256 and look for scales that are not finite; without it only sizes
    and shapes are compared. Raises :class:`DataError` with the name of the file that is missing or does not fit.
    """
    directory = Path(directory)
    manifest = read_manifest(directory / MANIFEST)
    for name, digest in manifest.configs.items():
        _check_config(directory / name, digest)
    path = directory / TENSORS
    tensors = _map_checked(path, manifest, check)
    packed = {name: _panels_of(path, tensors, name, entry, check) for name, entry in manifest.matrices.items()}
    for name, first in manifest.shared.items():
        if first not in tensors:
            raise DataError(f"{directory / MANIFEST}: {name} is one with {first!r}, which {TENSORS} does not hold")
        tensors[name] = tensors[first]
    config = read_config(directory, _shapes(manifest.matrices, tensors))
    generation = read_generation_config(directory, config)
    return PackedModel(directory, config, generation, manifest, packed, tensors)


def _check_config(path: Path, digest: str) -> None:
    if not path.is_file():
        raise DataError(f"no {path.name} in {path.parent}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise DataError(f"{path} does not have the sha256 of {MANIFEST}: altered since it was written")


def _map_checked(path: Path, manifest: Manifest, check: bool) -> dict[str, torch.Tensor]:
    """The tensors of the file; what is checked is what is mapped, even where another takes its place meanwhile."""
    if not path.is_file():
        raise DataError(f"no {TENSORS} in {path.parent}")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size != manifest.file_bytes:
                expected = f"expected {manifest.file_bytes}: truncated or altered"
                raise DataError(f"{path} has {size} bytes, {expected}")
            file.seek(0)
            if check and hashlib.file_digest(file, "sha256").hexdigest() != manifest.file_sha256:
                raise DataError(f"{path} does not have the sha256 of {MANIFEST}: altered since it was written")
            return map_open(path, file)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _shapes(matrices: Mapping[str, PackedMatrix], tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by its name in the model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, entry in matrices.items():
        for module, rows in zip(entry.modules or (name,), entry.rows or (entry.n,), strict=True):
            shapes[f"{module}.weight"] = rows, entry.k
    return shapes


def _panels_of(path: Path, tensors: dict[str, Any], name: str, entry: PackedMatrix, check: bool) -> torch.Tensor:
    data = tensors.pop(name + SUFFIX, None)
    if data is None:
        raise DataError(f"{path} holds no {name + SUFFIX}, which {MANIFEST} describes")
    if data.dtype != torch.uint8 or tuple(data.shape) != (entry.bytes,):
        shape, dtype = list(data.shape), str(data.dtype).removeprefix("torch.")
        raise DataError(f"{path}: {name + SUFFIX} is {dtype} {shape}, its matrix needs uint8 [{entry.bytes}]")
    if check and not panels.scales_finite(data.numpy(), entry.group, entry.store_bits, entry.asymmetric):
        raise DataError(f"{path}: the scales of {name} hold NaN or infinite values")
    assert isinstance(data, torch.Tensor)
    return data


def dequantise(directory: Path) -> Any:
    """Return the packed model as a transformers model in fp32, in evaluation mode: plain torch, no native module."""
    model = load_packed(directory)
    return restore(model, model.linears())


def restore(model: PackedModel, matrices: Mapping[str, QuantisedLinear]) -> Any:
    """Return ``model``, unpacked to ``matrices``, in plain torch. Raises :class:`DataError` where its files do not fit
    its architecture."""
    try:
        return build_model(model.config, model.architecture, matrices, model.tensors, model.generation_config)
    except Exception as error:  # transformers' classes raise anything for a config that makes no sense
        reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{model.directory}: the tensors do not fit the architecture: {reason}") from error
