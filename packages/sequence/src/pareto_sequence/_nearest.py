"""Search for the size whose count of parameters is nearest to a wanted one."""

from __future__ import annotations

from collections.abc import Callable


def nearest(count: Callable[[int], int], target: int) -> int:
    """The number from 1 on whose ``count``, which grows, is nearest to ``target``."""
    low, high = 0, 1
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((number for number in (low, high) if number), key=lambda number: abs(count(number) - target))
