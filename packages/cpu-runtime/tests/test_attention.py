from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from pareto_cpu_runtime import _native

CHUNK = 128
ISAS = [isa for isa in ("scalar", "avx2", "avx512f") if isa in _native.available()]
# Relative to the largest value: fp32 sums; bf16 keeps 8 bits; int8 has 127 levels to each side.
TOLERANCE = {"fp32": 3e-6, "bf16": 1.2e-2, "int8": 2e-2}


@dataclass(kw_only=True)
class Setting:
    """One attention step; a row of a token table is that token's queries, keys and values."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    length: int = 300
    slots: int = 3
    layers: int = 1
    layer: int = 0
    threads: int = 2
    max_rows: int = 400
    dtype: str = "fp32"
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.scale = self.options.pop("scale", self.head_dim**-0.5)
        self.width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.pool = _native.Pool(self.threads)
        self.cache = _native.Cache(
            self.layers, self.slots, self.kv_heads, self.length, self.head_dim, dtype=self.dtype
        )

    def program(self, table: torch.Tensor) -> tuple[_native.Program, int]:
        program = _native.Program(self.pool, self.max_rows)
        x, y = program.buffer(self.width), program.buffer(self.heads * self.head_dim)
        program.embed(table, x)
        program.attention(
            self.cache, self.layer, x, y, self.heads, self.kv_heads, self.head_dim, self.scale, **self.options
        )
        program.finish()
        return program, y

    def run(self, table: torch.Tensor, calls: list[list[tuple[int, int, int]]]) -> torch.Tensor:
        """Context rows of all calls; a call is a list of (token, slot, position)."""
        program, y = self.program(table)
        return torch.cat([self.call(program, y, call) for call in calls])

    def call(self, program: _native.Program, y: int, rows: list[tuple[int, int, int]]) -> torch.Tensor:
        tokens, slots, positions = torch.tensor(rows, dtype=torch.int32).T.contiguous()
        program.run(tokens, slots, positions, torch.empty(0, dtype=torch.int32), torch.empty(0, 0))
        out = torch.empty(len(rows), self.heads * self.head_dim)
        program.read(y, out)
        return out


def table_of(setting: Setting, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, setting.width, generator=torch.Generator().manual_seed(seed))


def prompt(tokens: int, slot: int = 0, start: int = 0) -> list[tuple[int, int, int]]:
    return [(start + i, slot, start + i) for i in range(tokens)]


def rotated(x: torch.Tensor, row: torch.Tensor, interleaved: bool) -> torch.Tensor:
    half = len(row) // 2
    out = x.clone()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        out[a] = x[a] * row[i] - x[b] * row[half + i]
        out[b] = x[b] * row[i] + x[a] * row[half + i]
    return out


def normed(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return x if weight is None else x / torch.sqrt((x * x).mean() + epsilon) * weight.double()


def reference(setting: Setting, table: torch.Tensor) -> torch.Tensor:
    """The context of a prompt that is all of the table's rows, in float64 and one head at a time."""
    o, d, group = setting.options, setting.head_dim, setting.heads // setting.kv_heads
    tokens, epsilon = len(table), o.get("norm_epsilon", 1e-6)
    vectors = table.double().view(tokens, setting.heads + 2 * setting.kv_heads, d)

    def turned(head: int, weight: torch.Tensor | None) -> torch.Tensor:
        rows = [normed(vectors[i, head], weight, epsilon) for i in range(tokens)]
        if o.get("rotary") is not None:
            rows = [rotated(row, o["rotary"][i].double(), o.get("interleaved", False)) for i, row in enumerate(rows)]
        return torch.stack(rows)

    keys = [turned(setting.heads + j, o.get("k_norm")) for j in range(setting.kv_heads)]
    out = torch.empty(tokens, setting.heads, d, dtype=torch.float64)
    distance = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
    hidden = distance > 0
    if o.get("window"):
        hidden |= distance <= -o["window"]
    for head in range(setting.heads):
        scores = turned(head, o.get("q_norm")) @ keys[head // group].T * setting.scale
        if o.get("slopes") is not None:
            scores = scores + o["slopes"][head].double() * distance
        weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
        out[:, head] = weights @ vectors[:, setting.heads + setting.kv_heads + head // group]
    return out.view(tokens, -1)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def cos_sin(length: int, dim: int) -> torch.Tensor:
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


SHAPES = [
    (1, 1, 8),
    (2, 1, 7),
    (3, 3, 16),
    (4, 2, 80),
    (8, 1, 64),
    (6, 2, 96),
    (71, 1, 8),
    (8, 8, 32),
    (5, 1, 100),
    (2, 2, 128),
    (12, 4, 64),
    (26, 2, 8),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_prompt_against_float64(isa, heads, kv_heads, head_dim):
    setting = Setting(heads=heads, kv_heads=kv_heads, head_dim=head_dim, options={"isa": isa})
    table = table_of(setting, 150)
    assert error(setting.run(table, [prompt(150)]), reference(setting, table)) < TOLERANCE["fp32"]
