"""What ``pareto_cpu_runtime.json`` of a packed model says: how each matrix lies, and the sha256 of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pareto_core.config import Config
from pareto_core.errors import ConfigError, DataError
from pareto_cpu_runtime import panels
from pareto_cpu_runtime.configs import CONFIG, GENERATION, read_json
from pareto_cpu_runtime.quantise.config import BITS
from pareto_cpu_runtime.quantise.fusion import Order
from pareto_cpu_runtime.quantise.grid import store_bits

FORMAT_VERSION = 2
MANIFEST, TENSORS = "pareto_cpu_runtime.json", "model.safetensors"


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
    """The contents of ``pareto_cpu_runtime.json``.

    ``shared`` maps names of tensors to those that they are one with, ``configs`` the other JSON files to their sha256;
    ``sha256`` is that of all other fields (:func:`seal`).
    """

    format_version: int
    architecture: str
    matrices: Mapping[str, PackedMatrix]
    shared: Mapping[str, str]
    left_out: tuple[str, ...]
    recipe: Mapping[str, Any]
    file_bytes: int
    file_sha256: str
    configs: Mapping[str, str]
    sha256: str


def seal(values: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's fields, its own left out."""
    others = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest; raises :class:`DataError` with the file's name where it is not as it was written."""
    if not path.is_file():
        raise DataError(f"no {MANIFEST} in {path.parent}: not a packed model")
    try:
        values = read_json(path)
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version!r}; this release reads version {FORMAT_VERSION}: pack the model "
                "again"
            )
        if values.get("sha256") != seal(values):
            raise DataError(f"{path} does not have the sha256 that it names: altered since it was written")
        manifest = Manifest.from_json(values)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is damaged ({reason})") from error
    if set(manifest.configs) != {CONFIG, GENERATION}:
        raise DataError(f"{path} is damaged (configs must name {CONFIG} and {GENERATION})")
    return manifest
