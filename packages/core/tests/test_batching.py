from __future__ import annotations

import random
from collections import Counter

from pareto_core.tasks.batching import POOL, pooled_order

LENGTHS = random.Random(0).choices(range(1, 101), k=1003)


def test_every_item_is_in_one_batch_but_for_those_that_fill_none() -> None:
    order = pooled_order(LENGTHS, 8, seed=0)
    assert len(order) == 1000
    assert max(Counter(order).values()) == 1
    assert set(order) <= set(range(1003))
    assert pooled_order([5, 6], 3, seed=0) == []


def test_batches_hold_items_of_similar_length() -> None:
    order = pooled_order(LENGTHS, 8, seed=0)
    batches = [[LENGTHS[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
    # 128 items of lengths 1 to 100 in a pool: eight neighbours lie some 6 apart, eight drawn at random some 78
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 12
    firsts = [batch[0] for batch in batches[:POOL]]
    assert firsts != sorted(firsts)


def test_the_seed_decides_the_order() -> None:
    assert pooled_order(LENGTHS, 8, seed=1) == pooled_order(LENGTHS, 8, seed=1)
    assert pooled_order(LENGTHS, 8, seed=1) != pooled_order(LENGTHS, 8, seed=2)
