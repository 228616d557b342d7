"""The kernel's high-water mark: sees a transient that is gone, and can be reset."""

from __future__ import annotations

import mmap

from pareto_runner.memory import peak_host_bytes, reset_host_peak, resident_host_bytes

MIB = 2**20


def test_a_transient_allocation_is_seen_and_forgotten_after_a_reset() -> None:
    reset_host_peak()
    before = peak_host_bytes()
    with mmap.mmap(-1, 200 * MIB) as block:  # not from the heap, which may still hold enough
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    grown = peak_host_bytes() - before
    assert abs(grown - 200 * MIB) < 4 * MIB
    reset_host_peak()
    assert peak_host_bytes() < before + 100 * MIB
    assert 0 < resident_host_bytes() <= peak_host_bytes()
