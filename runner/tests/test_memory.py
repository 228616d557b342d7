"""The kernel's high-water mark: sees a transient that is gone, and can be reset."""

from __future__ import annotations

from pareto_runner.memory import peak_host_bytes, reset_host_peak, resident_host_bytes

MIB = 2**20


def test_a_transient_allocation_is_seen_and_forgotten_after_a_reset() -> None:
    reset_host_peak()
    before = peak_host_bytes()
    block = bytearray(200 * MIB)
    block[::4096] = b"x" * len(range(0, len(block), 4096))
    del block
    grown = peak_host_bytes() - before
    assert abs(grown - 200 * MIB) < 4 * MIB
    reset_host_peak()
    assert peak_host_bytes() < before + 100 * MIB
    assert 0 < resident_host_bytes() <= peak_host_bytes()
