"""Which items share a batch."""

from __future__ import annotations

from collections.abc import Sequence

#: batches in which training items are sorted by length
POOL = 16


def pooled_order(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """Shuffle items of the given ``lengths``, drop what does not fill a batch, and batch those of similar length.

    Items are sorted by length within pools of :data:`POOL` batches, whose batches are then shuffled: less padding to
    compute, and still every item once in an epoch.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    total = len(lengths)
    order = torch.randperm(total, generator=generator).tolist()[: total - total % batch_size]
    pools = [order[i : i + POOL * batch_size] for i in range(0, len(order), POOL * batch_size)]
    pooled = [i for pool in pools for i in sorted(pool, key=lambda i: lengths[i])]
    batches = [pooled[i : i + batch_size] for i in range(0, len(pooled), batch_size)]
    return [i for b in torch.randperm(len(batches), generator=generator).tolist() for i in batches[b]]
