"""Packed models on disk: what the runtime maps into memory, and what any machine turns back into plain torch.

A directory with

* ``config.json``: the transformers configuration of the source model;
* ``pareto_cpu_runtime.json``: the format's version, the shape and precision of each packed matrix, the recipe, and the
  size and sha256 of the tensors' file;
* ``model.safetensors``: each quantised matrix as one uint8 tensor ``<module>.packed`` in the panel layout of
  ``native/packed.h``, all other tensors in their dtype under their own names.

A file that is truncated, altered or of another version raises :class:`DataError` with its name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pareto_core.config import Config
from pareto_core.errors import ConfigError, DataError, ModelError
from pareto_cpu_runtime import panels
from pareto_cpu_runtime.quantise.config import BITS
from pareto_cpu_runtime.quantise.fusion import Fusion, Order, fuse, split
from pareto_cpu_runtime.quantise.grid import store_bits
from pareto_cpu_runtime.quantise.matrix import Matrices, QuantisedLinear, QuantisedModel
from pareto_cpu_runtime.quantise.restore import build_model
from pareto_cpu_runtime.tensor_file import Pending, file_sha256, map_tensors, write_tensors

FORMAT_VERSION = 1
MANIFEST, TENSORS, CONFIG = "pareto_cpu_runtime.json", "model.safetensors", "config.json"
SUFFIX = ".packed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedMatrix(Config):
    """One packed matrix: n outputs, k inputs in groups of ``group``; ``bits`` per code (3-bit codes lie in 4).

    ``modules`` and ``rows`` say whose weights a fused matrix holds and how many outputs each has; empty if one only.
    """

    n: int
    k: int
    group: int
    bits: int
    asymmetric: bool
    multiplier: float
    modules: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    order: Order = "concat"

    def validate(self) -> None:
        """Check ranges."""
        for field in ("n", "k", "group"):
            self.require(field, getattr(self, field) >= 1, "must be at least 1")
        self.require("group", self.k % self.group == 0, f"must divide k = {self.k}")
        self.require("bits", self.bits in BITS, "allowed: 3, 4 or 8")
        self.require("multiplier", self.multiplier > 0, "must be above 0")
        self.require("rows", len(self.rows) == len(self.modules), "must have a count per module")
        self.require("rows", not self.rows or sum(self.rows) == self.n, f"must add up to n = {self.n}")

    @property
    def store_bits(self) -> int:
        """Bits per code in the panels, 4 or 8."""
        return store_bits(self.bits)

    @property
    def bytes(self) -> int:
        """Bytes of the panels."""
        return panels.packed_bytes(self.n, self.k, self.group, self.store_bits, self.asymmetric)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(Config):
    """The contents of ``pareto_cpu_runtime.json``; ``shared`` maps names of tensors to those that they are one with."""

    format_version: int
    architecture: str
    matrices: Mapping[str, PackedMatrix]
    shared: Mapping[str, str]
    left_out: tuple[str, ...]
    recipe: Mapping[str, Any]
    file_bytes: int
    file_sha256: str


@dataclasses.dataclass(frozen=True)
class PackedModel:
    """A mapped packed model: nothing is read before it is touched.

    ``matrices`` says how each packed matrix lies, ``panels(name)`` gives its bytes, ``tensors`` the others by name.
    """

    directory: Path
    config: Any
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
    write_packed(directory, *source, fusions, model.left_out, model.recipe)


def write_packed(
    directory: Path,
    config: Any,
    architecture: str,
    matrices: Mapping[str, QuantisedLinear],
    tensors: Mapping[str, torch.Tensor],
    fusions: Sequence[Fusion] = (),
    left_out: Sequence[str] = (),
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Write a packed model matrix by matrix: no more than one is packed at a time.

    Raises :class:`ModelError` naming a matrix whose scales are not finite or whose codes do not fit.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    entries, pending = _plan(matrices, fusions)
    first_of, shared = _shared(tensors)
    for name in sorted(first_of.values(), key=lambda name: -tensors[name].element_size()):
        tensor = tensors[name]
        pending[name] = Pending(tensor.dtype, tuple(tensor.shape), functools.partial(tensors.__getitem__, name))
    (directory / MANIFEST).unlink(missing_ok=True)
    size, digest = write_tensors(directory / TENSORS, pending)
    _write_config(config, architecture, directory)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        architecture=architecture,
        matrices=entries,
        shared=shared,
        left_out=tuple(left_out),
        recipe=dict(recipe or {}),
        file_bytes=size,
        file_sha256=digest,
    )
    temporary = directory / f"{MANIFEST}.part"
    temporary.write_text(json.dumps(manifest.to_json(), indent=1) + "\n")
    os.replace(temporary, directory / MANIFEST)


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


def _write_config(config: Any, architecture: str, directory: Path) -> None:
    values = config.to_dict()
    values["architectures"] = [architecture]
    (directory / CONFIG).write_text(json.dumps(values, indent=1, default=str) + "\n")


def load_packed(directory: Path, check: bool = True) -> PackedModel:
    """Map the packed model in ``directory``.

    ``check`` reads the file once, to compare its sha256 and look for scales that are not finite; without it only sizes
    and shapes are compared. Raises :class:`DataError` with the name of the file that is missing or does not fit.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory / MANIFEST)
    path = directory / TENSORS
    if not path.is_file():
        raise DataError(f"no {TENSORS} in {directory}")
    if path.stat().st_size != manifest.file_bytes:
        raise DataError(f"{path} has {path.stat().st_size} bytes, expected {manifest.file_bytes}: truncated or altered")
    if check and file_sha256(path) != manifest.file_sha256:
        raise DataError(f"{path} does not have the sha256 of {MANIFEST}: altered since it was written")
    tensors = map_tensors(path)
    packed = {name: _panels_of(path, tensors, name, entry, check) for name, entry in manifest.matrices.items()}
    for name, first in manifest.shared.items():
        if first not in tensors:
            raise DataError(f"{directory / MANIFEST}: {name} is one with {first!r}, which {TENSORS} does not hold")
        tensors[name] = tensors[first]
    return PackedModel(directory, _read_config(directory), manifest, packed, tensors)


def _read_manifest(path: Path) -> Manifest:
    if not path.is_file():
        raise DataError(f"no {MANIFEST} in {path.parent}: not a packed model")
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(f"{path} has format version {version!r}; this release reads version {FORMAT_VERSION}")
        return Manifest.from_json(values)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is damaged ({reason})") from error


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


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    path = directory / CONFIG
    if not path.is_file():
        raise DataError(f"no {CONFIG} in {directory}")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def dequantise(directory: Path) -> Any:
    """Return the packed model as a transformers model in fp32, in evaluation mode: plain torch, no native module."""
    model = load_packed(directory)
    try:
        return build_model(model.config, model.architecture, model.linears(), model.tensors)
    except ModelError as error:
        raise DataError(f"{model.directory}: the tensors do not fit the architecture: {error}") from error
