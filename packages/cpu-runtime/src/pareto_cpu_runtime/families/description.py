"""What the runtime needs to know of an architecture: which modules make which operator, and how they are joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation before an operator: RMSNorm or LayerNorm, by the name of its module."""

    kind: Literal["rms", "layer"]
    module: str
    epsilon: float


@dataclasses.dataclass(frozen=True)
class Rows:
    """Outputs of one linear module: all, or those that ``index`` names, in its order."""

    module: str
    index: NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """One matrix multiplication, made of the rows of one module or several.

    ``gated`` operators have two parts, gate and up, and give activation(gate) * up. Of an operator that is split over
    processes by its inputs, ``columns`` are this one's (first, last), and one process alone adds the bias.
    """

    name: str
    parts: tuple[Rows, ...]
    activation: str = "none"
    gated: bool = False
    columns: tuple[int, int] | None = None
    biased: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A decoder block: attention and feed-forward network, one after the other or (``parallel``) side by side."""

    attention_norm: Norm
    qkv: Operator
    out: Operator
    ffn_norm: Norm
    up: Operator
    down: Operator
    parallel: bool = False
    #: positions that a token sees, itself included; 0 for all
    window: int = 0
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: ``table(length)`` is fp32 (length, dim), cosines first, then sines, dim / 2 of each."""

    dim: int
    table: Callable[[int], NDArray[np.float32]]
    interleaved: bool = False
    #: tokens up to which one table holds for every length; None without such a limit
    longest: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A whole decoder. Names are those of the transformers state dict, without ``.weight`` or ``.bias``."""

    model_type: str
    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    scale: float
    positions: int
    embedding: str
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Operator
    rotary: Rotary | None = None
    #: ALiBi slopes, fp32 (heads)
    slopes: NDArray[np.float32] | None = None
    config: Any = None

    def operators(self) -> list[Operator]:
        """Every operator in the order in which a token meets them."""
        inner = [op for block in self.blocks for op in (block.qkv, block.out, block.up, block.down)]
        return [*inner, self.head]

    def modules(self) -> list[str]:
        """Names of the linear modules that the operators are made of."""
        return list(dict.fromkeys(part.module for op in self.operators() for part in op.parts))


def whole(name: str, *modules: str, activation: str = "none", gated: bool = False) -> Operator:
    """An operator of all rows of ``modules``, one below the other."""
    return Operator(name=name, parts=tuple(Rows(module) for module in modules), activation=activation, gated=gated)


def split_fused(module: str, pattern: NDArray[np.int64], head_dim: int, name: str) -> Operator:
    """Queries, keys and values out of one module whose heads lie mixed.

    ``pattern`` holds, per head of ``head_dim`` rows in the module, 0 for a query, 1 for a key, 2 for a value.
    """
    rows = np.arange(len(pattern) * head_dim).reshape(len(pattern), head_dim)
    return Operator(name=name, parts=tuple(Rows(module, rows[pattern == kind].reshape(-1)) for kind in range(3)))
