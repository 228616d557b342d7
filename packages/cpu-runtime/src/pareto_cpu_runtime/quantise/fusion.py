"""Matrices with the same inputs as one: Q, K and V one after the other, gate and up in turns of 16 rows.

The runtime multiplies the fused matrix at once; a gated epilogue finds 16 gates and the 16 values that they multiply
in neighbouring columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from pareto_core.errors import ModelError
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear

Order = Literal["concat", "interleave"]
TURN = 16


@dataclasses.dataclass(frozen=True)
class Fusion:
    """``name`` is what the fused matrix is called, ``modules`` whose weights it holds, ``order`` how their rows lie."""

    name: str
    modules: tuple[str, ...]
    order: Order = "concat"


def row_order(rows: Sequence[int], order: Order) -> torch.Tensor:
    """Return, for each row of the fused matrix, its number in the matrices laid one after the other, int64 (sum,).

    Raises :class:`ModelError` where rows cannot go in turns.
    """
    total = torch.arange(sum(rows))
    if order == "concat":
        return total
    if len(set(rows)) != 1 or rows[0] % TURN != 0:
        raise ModelError(f"matrices of {list(rows)} rows cannot be interleaved: need equal multiples of {TURN}")
    return total.view(len(rows), -1, TURN).transpose(0, 1).reshape(-1)


def fuse(matrices: Sequence[QuantisedLinear], order: Order) -> QuantisedLinear:
    """Return the fused matrix.

    Raises :class:`ModelError` where inputs, precision or row counts do not fit, or scales have no common multiplier.
    """
    first = matrices[0]
    if len({(m.shape[1], m.group, m.bits, m.symmetric) for m in matrices}) != 1:
        raise ModelError("matrices of different inputs or precision cannot be fused")
    multiplier = max(m.multiplier for m in matrices)
    parts = [m.aligned(multiplier) for m in matrices]
    rows = row_order([m.shape[0] for m in parts], order)
    zeros = None if first.zeros is None else torch.cat([m.zeros for m in parts if m.zeros is not None])[rows]
    codes, scales = torch.cat([m.codes for m in parts])[rows], torch.cat([m.scales for m in parts])[rows]
    return QuantisedLinear(codes, scales, zeros, multiplier, first.group, first.bits)


def split(matrix: QuantisedLinear, rows: Sequence[int], order: Order) -> list[QuantisedLinear]:
    """Return the matrices of ``rows`` rows each that were fused: the inverse of :func:`fuse`."""
    if sum(rows) != matrix.shape[0]:
        raise ModelError(f"a matrix of {matrix.shape[0]} rows does not split into {list(rows)}")
    places = torch.argsort(row_order(rows, order)).split(list(rows))
    return [
        dataclasses.replace(
            matrix,
            codes=matrix.codes[place],
            scales=matrix.scales[place],
            zeros=None if matrix.zeros is None else matrix.zeros[place],
        )
        for place in places
    ]
