"""The native module's programs in plain numpy, in float64: what the runtime is tested with apart from the kernels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass
class Weight:
    values: np.ndarray

    @staticmethod
    def of(data: Any, n: int, k: int, group: int, bits: int, asymmetric: bool, multiplier: float) -> Weight:
        return PACKED.pop(data.ctypes.data)(multiplier)


PACKED: dict[int, Any] = {}


def packed_bytes(n: int, k: int, group: int, bits: int, asymmetric: bool) -> int:
    return -(-n // 64) * 64 * k * bits // 8 + 64


def pack(codes, scales, zeros, bits, out):
    groups = scales.shape[1]
    zero = np.full(scales.shape, 1 << (bits - 1), np.float64) if zeros is None else zeros.astype(np.float64)
    steps = codes.reshape(len(codes), groups, -1).astype(np.float64) - zero[:, :, None]
    values = (steps * scales.view(np.float16).astype(np.float64)[:, :, None]).reshape(codes.shape)
    PACKED[out.ctypes.data] = lambda multiplier: Weight(values * multiplier)


def pack_dense(values, out):
    values = np.array(values.float() if hasattr(values, "float") else values, dtype=np.float64)
    PACKED[out.ctypes.data] = lambda multiplier: Weight(values)


class Pool:
    def __init__(self, threads: int, cpus: list[int] | None = None) -> None:
        self.threads = threads


class Cache:
    def __init__(self, layers, slots, kv_heads, length, head_dim, dtype="fp32"):
        self.keys = np.full((layers, slots, length, kv_heads, head_dim), np.nan)
        self.values = self.keys.copy()
        self.bytes, self.length, self.slots = self.keys.nbytes // 4, length, slots

    def copy(self, from_slot, to_slot, tokens):
        self.keys[:, to_slot, :tokens] = self.keys[:, from_slot, :tokens]
        self.values[:, to_slot, :tokens] = self.values[:, from_slot, :tokens]


_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def rms(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def normalised(x, norm, weight, bias, epsilon):
    if norm == "none":
        return x
    if norm == "rms":
        return rms(x, weight, epsilon)
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * weight
    return y if bias is None else y + bias


def rotated(x, row, interleaved):
    """x (heads, head_dim), row (dim): cosines, then sines."""
    half = len(row) // 2
    cos, sin = row[:half], row[half:]
    y = x.copy()
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    y[:, first] = x[:, first] * cos - x[:, second] * sin
    y[:, second] = x[:, second] * cos + x[:, first] * sin
    return y


class Program:
    def __init__(self, pool, max_rows):
        self.max_rows, self.widths, self.steps, self.planned_bytes = max_rows, [], [], 0
        self.slots = self.length = None

    def buffer(self, width):
        self.widths.append(width)
        return len(self.widths) - 1

    def embed(self, table, x, scale=1.0):
        table = np.array(table.float(), dtype=np.float64) * scale
        self.vocabulary = len(table)

        def step(buffers, batch):
            buffers[x] = table[batch["tokens"]]

        self.steps.append(step)

    def linear(
        self, weight, x, y=None, norm="none", norm_weight=None, norm_bias=None, epsilon=1e-5, bias=None,
        activation="none", gated=False, residual=None, kernel="auto", compute="",
    ):
        act = ACTIVATIONS[activation]
        assert weight.values.shape[1] == self.widths[x]

        def step(buffers, batch):
            rows = buffers[x] if y is not None else buffers[x][batch["want"]]
            rows = normalised(rows, norm, norm_weight, norm_bias, epsilon)
            # Row by row, so that a row's result does not depend on those beside it.
            out = np.stack([weight.values @ row for row in rows]) if len(rows) else np.zeros((0, len(weight.values)))
            out = out if bias is None else out + bias
            if gated:
                blocks = out.reshape(len(out), -1, 2, 16)
                out = (act(blocks[:, :, 0]) * blocks[:, :, 1]).reshape(len(out), -1)
            else:
                out = act(out)
            out = out if residual is None else out + buffers[residual]
            if y is None:
                batch["logits"][:] = out
            else:
                assert out.shape[1] == self.widths[y]
                buffers[y] = out

        self.steps.append(step)
        return "reference"

    def attention(
        self, cache, layer, x, y, heads, kv_heads, head_dim, scale, rotary=None, interleaved=False, slopes=None,
        window=0, q_norm=None, k_norm=None, norm_epsilon=1e-6,
    ):
        self.slots, self.length = cache.slots, cache.length

        def one(row, slot, position):
            parts = row.reshape(-1, head_dim)
            q, k, v = parts[:heads], parts[heads : heads + kv_heads], parts[heads + kv_heads :]
            q = q if q_norm is None else rms(q, q_norm, norm_epsilon)
            k = k if k_norm is None else rms(k, k_norm, norm_epsilon)
            if rotary is not None:
                q, k = (rotated(part, rotary[position].astype(np.float64), interleaved) for part in (q, k))
            cache.keys[layer, slot, position], cache.values[layer, slot, position] = k, v
            first = max(0, position + 1 - window) if window else 0
            keys = np.repeat(cache.keys[layer, slot, first : position + 1], heads // kv_heads, axis=1)
            values = np.repeat(cache.values[layer, slot, first : position + 1], heads // kv_heads, axis=1)
            scores = np.einsum("hd,phd->hp", q, keys) * scale
            if slopes is not None:
                scores += slopes[:, None] * (np.arange(first, position + 1) - position)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            return np.einsum("hp,phd->hd", weights, values).reshape(-1)

        def step(buffers, batch):
            rows = zip(buffers[x], batch["slots"], batch["positions"], strict=True)
            buffers[y] = np.stack([one(*row) for row in rows])

        self.steps.append(step)

    def finish(self):
        self.planned_bytes = sum(self.widths) * self.max_rows * 4

    def run(self, tokens, slots, positions, want, logits):
        for array in (tokens, slots, positions, want):
            assert array.dtype == np.int32
        assert 1 <= len(tokens) <= self.max_rows
        assert logits.dtype == np.float32
        assert (tokens < self.vocabulary).all()
        assert (tokens >= 0).all()
        assert (positions < self.length).all()
        assert (slots < self.slots).all()
        assert (np.diff(want) > 0).all()
        batch = {"tokens": tokens, "slots": slots, "positions": positions, "want": want, "logits": logits}
        buffers: dict[int, np.ndarray] = {}
        for step in self.steps:
            step(buffers, batch)
