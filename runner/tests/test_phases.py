"""Phases: what each takes and holds, one inside another, and over several processes."""

from __future__ import annotations

import json
import mmap
import time

import pytest

from pareto_core import Measurement
from pareto_runner.phases import MIB, Phases
from pareto_runner.targets.xeon import XeonTarget


def taken(mib: int) -> mmap.mmap:
    """Touched memory straight from the kernel: a heap may still hold enough to give without growing."""
    block = mmap.mmap(-1, mib * MIB)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    return block


def hold(mib: int) -> None:
    taken(mib).close()


def values(phases: Phases) -> dict[str, float]:
    return {item.name: item.value for item in phases.measurements()}


def test_phases_add_up_and_keep_their_own_peaks() -> None:
    phases = Phases(XeonTarget())
    phases.start_from_here()
    with phases("train"):
        hold(64)
    with phases("finish"):
        hold(200)
    with phases("train"):
        hold(10)
    found = values(phases)
    assert 60 < found["train_peak_mib"] < 75
    assert found["time_s.train"] > 0
    assert found["time_s.finish"] > 0


def test_a_phase_inside_another_counts_for_itself_alone() -> None:
    phases = Phases(XeonTarget())
    phases.start_from_here()
    start = time.perf_counter()
    with phases("train"):
        hold(32)
        with phases("checkpoint"):
            hold(128)
            time.sleep(0.2)
        hold(64)
    elapsed = time.perf_counter() - start
    found = values(phases)
    assert 60 < found["train_peak_mib"] < 75
    assert found["time_s.checkpoint"] >= 0.2
    assert 0 < found["time_s.train"] <= elapsed - found["time_s.checkpoint"]


def test_a_later_process_goes_on_from_what_an_earlier_one_measured() -> None:
    earlier = Phases(XeonTarget())
    earlier.start_from_here()
    with earlier("train"):
        hold(96)
        time.sleep(0.1)
    with earlier("evaluate"):
        pass
    kept = json.loads(json.dumps(earlier.so_far("train", "checkpoint")))
    assert list(kept["seconds"]) == ["train"]
    ballast = taken(50)  # what the later process holds before is not its training's
    later = Phases(XeonTarget())
    later.start_from_here()
    start = time.perf_counter()
    with later("train"):
        with later("checkpoint"):
            later.go_on_from(kept)
        hold(16)
        time.sleep(0.05)
    elapsed = time.perf_counter() - start
    found, before = values(later), values(earlier)
    assert found["train_peak_mib"] == pytest.approx(before["train_peak_mib"], abs=0.1)
    assert 92 < before["train_peak_mib"] < 107
    assert before["time_s.train"] + 0.05 <= found["time_s.train"] < before["time_s.train"] + elapsed
    assert "time_s.evaluate" not in found
    assert len(ballast) == 50 * MIB


def test_a_later_measurement_of_a_name_replaces_the_earlier() -> None:
    phases = Phases(XeonTarget())
    phases.add([Measurement(name="steps", value=1, unit="steps")])
    phases.add([Measurement(name="steps", value=2, unit="steps")])
    assert values(phases) == {"steps": 2}
