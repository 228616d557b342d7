"""A quantised matrix and a quantised model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from pareto_core.errors import ModelError
from pareto_cpu_runtime.quantise.grid import Grid, code_range, store_bits


@dataclasses.dataclass(frozen=True)
class QuantisedLinear:
    """The weight of y = x W^T as codes: W = multiplier * scales * (codes - zeros), a scale for each group of inputs.

    ``codes`` uint8 (n, k), ``scales`` fp16 (n, k / group), ``zeros`` uint8 (n, k / group) or None where symmetric (then
    the zero is 8 for 3 and 4 bits, 128 for 8). Raises :class:`ModelError` where the parts do not fit together.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    multiplier: float
    group: int
    bits: int

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = (n, k // self.group)
        fits = k % self.group == 0 and self.scales.shape == groups
        if not fits or (self.zeros is not None and self.zeros.shape != groups):
            raise ModelError(
                f"codes {n} x {k} in groups of {self.group} need scales and zeros of {n} x {k / self.group:g}"
            )
        if self.codes.dtype != torch.uint8 or self.scales.dtype != torch.float16:
            raise ModelError(f"codes must be uint8 and scales float16, not {self.codes.dtype} and {self.scales.dtype}")

    @classmethod
    def of(cls, grid: Grid, codes: torch.Tensor) -> QuantisedLinear:
        """Return the matrix of ``codes`` (n, k), of any dtype, on ``grid``."""
        kept = codes.to(torch.uint8)
        return cls(kept, grid.stored_scales, grid.stored_zeros, grid.multiplier, grid.group, grid.bits)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs n and inputs k."""
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    @property
    def symmetric(self) -> bool:
        """Whether every group has its zero in the middle."""
        return self.zeros is None

    @property
    def store_bits(self) -> int:
        """Bits per code in the packed format, 4 or 8."""
        return store_bits(self.bits)

    @property
    def grid(self) -> Grid:
        """The scales and zeros as a grid in fp32."""
        scales = self.scales.float() * self.multiplier
        middle = float(2 ** (self.store_bits - 1))
        zeros = torch.full_like(scales, middle) if self.zeros is None else self.zeros.float()
        return Grid(scales, zeros, self.multiplier, self.group, self.bits, self.symmetric)

    def dequantise(self) -> torch.Tensor:
        """Return the weights fp32 (n, k)."""
        return self.grid.values(self.codes)

    def aligned(self, multiplier: float) -> QuantisedLinear:
        """Return the same weights with another power of two as multiplier, so that matrices can share one.

        Raises :class:`ModelError` where a scale would leave fp16's range or lose digits.
        """
        scales = (self.scales.float() * (self.multiplier / multiplier)).half()
        if not torch.equal(scales.float() * multiplier, self.scales.float() * self.multiplier):
            raise ModelError(
                f"scales with multiplier {self.multiplier:g} cannot be written with {multiplier:g} exactly"
            )
        return dataclasses.replace(self, scales=scales, multiplier=multiplier)

    def check(self, name: str) -> None:
        """Raise :class:`ModelError` naming the matrix where scales are not finite or codes out of range."""
        if not bool(self.scales.isfinite().all()):
            raise ModelError(f"{name}: scales hold NaN or infinite values")
        low, high = code_range(self.bits, self.symmetric)
        if self.zeros is not None and self.codes.numel() and int(self.zeros.max()) > high:
            raise ModelError(f"{name}: zeros above {high} do not fit {self.bits} bits")
        if self.codes.numel() and not low <= int(self.codes.min()) <= int(self.codes.max()) <= high:
            raise ModelError(f"{name}: codes outside {low} … {high} do not fit {self.bits} bits")


class Matrices(MutableMapping[str, QuantisedLinear]):
    """Quantised matrices by module name, 4-bit codes held two to a byte; a matrix taken out has a byte per code."""

    def __init__(self, matrices: Mapping[str, QuantisedLinear] | None = None) -> None:
        self._held: dict[str, tuple[QuantisedLinear, tuple[int, int]]] = {}
        for name, matrix in (matrices or {}).items():
            self[name] = matrix

    def __getitem__(self, name: str) -> QuantisedLinear:
        held, shape = self._held[name]
        if held.store_bits == 8:
            return held
        codes = torch.stack((held.codes & 15, held.codes >> 4), 2).view(shape[0], -1)[:, : shape[1]]
        return _with_codes(held, codes.contiguous())

    def __setitem__(self, name: str, matrix: QuantisedLinear) -> None:
        codes = matrix.codes
        if matrix.store_bits == 4:
            codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
            codes = codes[:, ::2] | (codes[:, 1::2] << 4)
        self._held[name] = (_with_codes(matrix, codes), matrix.shape)

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _with_codes(matrix: QuantisedLinear, codes: torch.Tensor) -> QuantisedLinear:
    """A copy whose codes may be two to a byte, which the constructor would refuse."""
    copy = object.__new__(QuantisedLinear)
    for field in dataclasses.fields(matrix):
        object.__setattr__(copy, field.name, getattr(matrix, field.name))
    object.__setattr__(copy, "codes", codes)
    return copy


@dataclasses.dataclass(frozen=True)
class QuantisedModel:
    """A model whose matrices are quantised.

    ``config`` is the transformers configuration, ``architecture`` the model's class in transformers, ``matrices`` the
    quantised weights by module name, ``tensors`` all others by their name in the model, ``left_out`` the operators that
    were kept, ``recipe`` the quantisation's configuration as JSON, ``generation_config`` transformers' (None: what it
    makes of ``config``).
    """

    config: Any
    architecture: str
    matrices: Mapping[str, QuantisedLinear]
    tensors: Mapping[str, torch.Tensor]
    left_out: tuple[str, ...]
    recipe: Mapping[str, Any]
    generation_config: Any = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zeros, and of the other tensors (those that share storage counted once)."""
        matrices = 0
        for matrix in self.matrices.values():
            n, k = matrix.shape
            matrices += n * k * matrix.store_bits // 8 + matrix.scales.numel() * (2 if matrix.symmetric else 3)
        others = {t.data_ptr(): t.numel() * t.element_size() for t in self.tensors.values()}
        return matrices + sum(others.values())

    def dequantise(self) -> Any:
        """Return a transformers model in plain torch whose matrices are the quantised ones, in evaluation mode."""
        from pareto_cpu_runtime.quantise.restore import build_model

        return build_model(self.config, self.architecture, self.matrices, self.tensors, self.generation_config)
