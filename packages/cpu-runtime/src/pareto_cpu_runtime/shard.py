"""Tensor parallelism in one dimension: each of several processes gets some heads and some of the feed-forward width.

Queries, keys, values, gate and up are split by their outputs, the matrices that follow them by their inputs; what those
give are parts of a sum over the processes (M. Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from pareto_core.errors import UnsupportedError
from pareto_cpu_runtime.families.description import Block, Decoder, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


def shard(decoder: Decoder, rank: int, ranks: int) -> Decoder:
    """The part of ``decoder`` that process ``rank`` of ``ranks`` computes.

    A single key-value head is kept by every process. Raises :class:`UnsupportedError` where heads do not divide, or the
    feed-forward width is too narrow.
    """
    shared = decoder.kv_heads == 1
    sizes = {"heads": decoder.heads} | ({} if shared else {"kv_heads": decoder.kv_heads})
    for name, size in sizes.items():
        if size % ranks:
            raise UnsupportedError(f"{decoder.model_type}: {name} = {size} cannot be split over {ranks} processes")
    first, last = ffn_range(decoder.ffn, rank, ranks)
    slopes = decoder.slopes
    return dataclasses.replace(
        decoder,
        heads=decoder.heads // ranks,
        kv_heads=1 if shared else decoder.kv_heads // ranks,
        ffn=last - first,
        slopes=None if slopes is None else np.split(slopes, ranks)[rank].copy(),
        blocks=tuple(_block(decoder, block, rank, ranks) for block in decoder.blocks),
    )


def _block(decoder: Decoder, block: Block, rank: int, ranks: int) -> Block:
    head, kv = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    kv_ranks = 1 if decoder.kv_heads == 1 else ranks
    parts = zip(block.qkv.parts, (head, kv, kv), (ranks, kv_ranks, kv_ranks), strict=True)
    qkv = tuple(_rows(part, size, rank % split, split) for part, size, split in parts)
    first, last = ffn_range(decoder.ffn, rank, ranks)
    up = tuple(Rows(part.module, _index(part, decoder.ffn)[first:last]) for part in block.up.parts)
    heads = head // ranks * rank, head // ranks * (rank + 1)
    return dataclasses.replace(
        block,
        qkv=dataclasses.replace(block.qkv, parts=qkv),
        out=dataclasses.replace(block.out, columns=heads, biased=rank == 0),
        up=dataclasses.replace(block.up, parts=up),
        down=dataclasses.replace(block.down, columns=(first, last), biased=rank == 0),
    )


def ffn_range(ffn: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and last of a process's share of the feed-forward width, on the ends of groups of 128 or 32.

    Raises :class:`UnsupportedError` where a process would get none.
    """
    unit = next(unit for unit in (128, 32, 1) if ffn % unit == 0)
    units = ffn // unit
    if units < ranks:
        raise UnsupportedError(f"a feed-forward width of {ffn} cannot be split over {ranks} processes")
    return units * rank // ranks * unit, units * (rank + 1) // ranks * unit


def _index(part: Rows, size: int) -> NDArray[np.int64]:
    return np.arange(size) if part.index is None else part.index


def _rows(part: Rows, size: int, rank: int, ranks: int) -> Rows:
    return Rows(part.module, np.split(_index(part, size), ranks)[rank])


def cpu_sets(cpus: list[int], sockets: dict[int, int], ranks: int) -> list[list[int]]:
    """Disjoint sets of ``cpus``, one per process, of equal size; those of a socket (``sockets``, by CPU) lie together.

    Raises :class:`UnsupportedError` where there are more processes than CPUs.
    """
    if ranks > len(cpus):
        raise UnsupportedError(f"{ranks} processes need a CPU each; this process may use {len(cpus)}")
    order = sorted(cpus, key=lambda cpu: (sockets.get(cpu, 0), cpu))
    size = len(order) // ranks
    return [order[rank * size : (rank + 1) * size] for rank in range(ranks)]
