"""Writes the random decoder as a packed model, and runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig

from pareto_cpu_runtime.checkpoint import write_packed
from pareto_cpu_runtime.families import fusions
from pareto_cpu_runtime.peers.geometry import BLOCK, Geometry, random_blocks, random_embedding
from pareto_cpu_runtime.quantise.fusion import Fusion
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear


class RandomMatrices(Mapping[str, QuantisedLinear]):
    """The decoder's matrices by name, made when they are asked for: one is in memory at a time."""

    def __init__(self, geometry: Geometry, group: int) -> None:
        self._shapes = {name: (n, k) for name, n, k in geometry.matrices()}
        self._group = group

    def __getitem__(self, name: str) -> QuantisedLinear:
        codes, scales = random_blocks(name, *self._shapes[name], self._group)
        kept = torch.from_numpy(scales[:, :: self._group // BLOCK].copy())
        return QuantisedLinear(torch.from_numpy(codes), kept, None, 1.0, self._group, 4)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write(geometry: Geometry, group: int, directory: Path) -> None:
    """Write the packed model."""
    config = LlamaConfig(**geometry.config())
    ones = [f"model.layers.{i}.{n}" for i in range(geometry.layers) for n in ("input", "post_attention")]
    tensors = {f"{name}_layernorm.weight": torch.ones(geometry.width) for name in ones}
    tensors["model.norm.weight"] = torch.ones(geometry.width)
    tensors["model.embed_tokens.weight"] = torch.from_numpy(random_embedding(geometry)).to(torch.bfloat16)
    fused = [Fusion(name, tuple(modules), order) for name, modules, order in fusions(config)]
    write_packed(directory, config, "LlamaForCausalLM", RandomMatrices(geometry, group), tensors, fused)
