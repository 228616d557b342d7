"""Matrices on their way from a checkpoint to the kernels: quantised or dense, cut, joined and written in panels.

Joining never rounds: parts with different formats are brought to one that holds them all (the smaller group, the wider
codes, zero points where one has them), and a part that was left unquantised makes the whole dense.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pareto_core.errors import ModelError
from pareto_cpu_runtime._library import native
from pareto_cpu_runtime.memory import move

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pareto_cpu_runtime.memory import Arena

PANEL = 64
HALF = 16
Index = slice | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantised:
    """multiplier * scale * (code - zero), a scale (and zero) per output and ``group`` inputs.

    ``codes`` u8 (n, k); ``scales`` fp16 (n, k / group); ``zeros`` u8 (n, k / group), None where every zero is the
    middle of the codes: 8 for 4 bits, 128 for 8.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8] | None
    group: int
    bits: int
    multiplier: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Dense:
        """The same matrix in fp32."""
        n, k = self.shape
        zero = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[:, :, None].astype(np.float32)
        codes = self.codes.reshape(n, k // self.group, self.group).astype(np.float32)
        scales = self.scales.astype(np.float32) * np.float32(self.multiplier)
        return Dense(values=((codes - zero) * scales[:, :, None]).reshape(n, k))

    def rows(self, index: Index) -> Quantised:
        """The outputs that ``index`` names."""
        zeros = None if self.zeros is None else self.zeros[index]
        return dataclasses.replace(self, codes=self.codes[index], scales=self.scales[index], zeros=zeros)

    def columns(self, first: int, last: int) -> Quantised:
        """Inputs ``first`` to ``last``, which must be ends of groups. A group as long as a row is cut with it."""
        group = self.group
        if group == self.shape[1]:
            group, at = last - first, slice(0, 1)
        elif first % group or last % group:
            raise ModelError(f"inputs {first} to {last} cut a group of {group}: use a smaller group or fewer ranks")
        else:
            at = slice(first // group, last // group)
        zeros = None if self.zeros is None else self.zeros[:, at]
        return dataclasses.replace(
            self, codes=self.codes[:, first:last], scales=self.scales[:, at], zeros=zeros, group=group
        )

    def padded(self, rows: int, columns: int) -> Quantised:
        """The matrix with outputs and inputs of zeros added up to ``rows`` x ``columns``."""
        n, k = self.shape
        group = columns if self.group == k else self.group
        if columns % group:
            raise ModelError(f"{k} inputs in groups of {group} cannot be filled up to {columns}")
        zero = 1 << (self.bits - 1)
        codes = np.full((rows, columns), zero, dtype=np.uint8)
        codes[:n, :k] = self.codes
        scales = np.zeros((rows, columns // group), dtype=np.float16)
        scales[:n, : self.scales.shape[1]] = self.scales
        zeros = None
        if self.zeros is not None:
            zeros = np.full(scales.shape, zero, dtype=np.uint8)
            zeros[:n, : self.zeros.shape[1]] = self.zeros
            if group != self.group:
                codes[:n, k:] = self.zeros
        return dataclasses.replace(self, codes=codes, scales=scales, zeros=zeros, group=group)

    def recast(self, group: int, bits: int, asymmetric: bool, multiplier: float) -> Quantised:
        """The same values in a format that holds more; exact, or :class:`ModelError`."""
        codes, zeros = self.codes, self.zeros
        if zeros is None and asymmetric:
            zeros = np.full(self.scales.shape, 1 << (self.bits - 1), dtype=np.uint8)
        elif zeros is None and bits != self.bits:
            codes = codes + np.uint8((1 << (bits - 1)) - (1 << (self.bits - 1)))
        scales = self.scales
        if multiplier != self.multiplier:
            exact = scales.astype(np.float64) * (self.multiplier / multiplier)
            scales = exact.astype(np.float16)
            if not np.array_equal(scales.astype(np.float64), exact):
                raise ModelError("scales of the parts of one operator lie too far apart: quantise them together")
        repeats = self.group // group
        scales = np.repeat(scales, repeats, axis=1)
        zeros = None if zeros is None else np.repeat(zeros, repeats, axis=1)
        return Quantised(codes=codes, scales=scales, zeros=zeros, group=group, bits=bits, multiplier=multiplier)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """An unquantised matrix (n, k): fp32, or the bits of bf16 as u16."""

    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.values.shape[0], self.values.shape[1]

    def dense(self) -> Dense:
        """The same matrix in fp32."""
        if self.values.dtype == np.uint16:
            return Dense(values=(self.values.astype(np.uint32) << 16).view(np.float32))
        return self

    def rows(self, index: Index) -> Dense:
        """The outputs that ``index`` names."""
        return Dense(values=self.values[index])

    def columns(self, first: int, last: int) -> Dense:
        """Inputs ``first`` to ``last``."""
        return Dense(values=self.values[:, first:last])

    def padded(self, rows: int, columns: int) -> Dense:
        """The matrix with outputs and inputs of zeros added up to ``rows`` x ``columns``."""
        values = np.zeros((rows, columns), dtype=self.values.dtype)
        values[: self.shape[0], : self.shape[1]] = self.values
        return Dense(values=values)


Matrix = Quantised | Dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panels:
    """A quantised matrix that lies in panels already; ``mapped`` data stay where they are."""

    data: NDArray[np.uint8]
    shape: tuple[int, int]
    group: int
    bits: int
    asymmetric: bool
    multiplier: float
    mapped: bool = False

    def weight(self, data: NDArray[np.uint8]) -> Any:
        """The native weight that reads ``data``, these panels or a copy of them."""
        return native().Weight.of(data, *self.shape, self.group, self.bits, self.asymmetric, self.multiplier)


def unified(parts: Sequence[Matrix]) -> list[Matrix]:
    """The parts of one operator in one format, values unchanged."""
    if len(parts) == 1:
        return list(parts)
    if any(isinstance(part, Dense) for part in parts):
        kinds = {part.values.dtype for part in parts if isinstance(part, Dense)}
        one_kind = len(kinds) == 1 and all(isinstance(part, Dense) for part in parts)
        return list(parts) if one_kind else [part.dense() for part in parts]
    quantised = [part for part in parts if isinstance(part, Quantised)]
    group = math.gcd(*(part.group for part in quantised))
    bits = max(part.bits for part in quantised)
    asymmetric = any(part.zeros is not None for part in quantised)
    multiplier = max(part.multiplier for part in quantised)
    return [part.recast(group, bits, asymmetric, multiplier) for part in quantised]


def stacked(parts: Sequence[Matrix]) -> Matrix:
    """The parts one below the other."""
    same = unified(parts)
    first = same[0]
    if len(same) == 1:
        return first
    if isinstance(first, Dense):
        return Dense(values=np.concatenate([part.values for part in same if isinstance(part, Dense)]))
    quantised = [part for part in same if isinstance(part, Quantised)]
    zeros = [part.zeros for part in quantised if part.zeros is not None]
    return dataclasses.replace(
        first,
        codes=np.concatenate([part.codes for part in quantised]),
        scales=np.concatenate([part.scales for part in quantised]),
        zeros=np.concatenate(zeros) if zeros else None,
    )


def interleaving(outputs: int) -> NDArray[np.int64]:
    """Rows of [gate; up], ``outputs`` each (a multiple of 32), in the order that gated kernels read: 16 and 16."""
    blocks = np.arange(2 * outputs).reshape(2, outputs // HALF, HALF)
    return blocks.transpose(1, 0, 2).reshape(-1)


def gated(gate: Matrix, up: Matrix) -> Matrix:
    """Gate and up interleaved, their outputs filled up to a multiple of 32."""
    outputs = -(-gate.shape[0] // (PANEL // 2)) * (PANEL // 2)
    if gate.shape != up.shape:
        raise ModelError(f"gate is {gate.shape} and up is {up.shape}: they must be alike")
    parts = [gate, up]
    if outputs != gate.shape[0]:
        parts = [part.padded(outputs, part.shape[1]) for part in parts]
    return stacked(parts).rows(interleaving(outputs))


def packed_bytes(matrix: Matrix) -> int:
    """Bytes of the matrix in panels."""
    n, k = matrix.shape
    if isinstance(matrix, Dense):
        return int(native().packed_bytes(n, k, k, matrix.values.dtype.itemsize * 8, False))
    return int(native().packed_bytes(n, k, matrix.group, matrix.bits, matrix.zeros is not None))


def place(matrix: Matrix | Panels, arena: Arena) -> tuple[Any, int]:
    """Put the matrix into the arena, unless it is mapped; returns the native weight and its bytes."""
    if isinstance(matrix, Panels):
        data = matrix.data
        if not matrix.mapped:
            data = arena.take(matrix.data.nbytes)
            move(matrix.data, data)
        return matrix.weight(data), data.nbytes
    out = arena.take(packed_bytes(matrix))
    return pack(matrix, out), out.nbytes


def pack(matrix: Matrix, out: NDArray[np.uint8]) -> Any:
    """Write the matrix to ``out`` in panels and return the native weight that reads it there."""
    n, k = matrix.shape
    if isinstance(matrix, Dense):
        values: Any = np.ascontiguousarray(matrix.values)
        bits = 32
        if values.dtype == np.uint16:
            import torch

            values, bits = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16), 16
        native().pack_dense(values, out)
        return native().Weight.of(out, n, k, k, bits, False, 1.0)
    codes = np.ascontiguousarray(matrix.codes)
    scales = np.ascontiguousarray(matrix.scales).view(np.uint16)
    zeros = None if matrix.zeros is None else np.ascontiguousarray(matrix.zeros)
    native().pack(codes, scales, zeros, matrix.bits, out)
    return native().Weight.of(out, n, k, matrix.group, matrix.bits, zeros is not None, matrix.multiplier)
