"""The self-test of the instruments: that it passes, that a naive sampler fails it, and that its own parts are right."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy.stats import binom

from pareto_runner import discover, selftest
from pareto_runner.memory import peak_host_bytes, reset_host_peak
from pareto_runner.selftest import experiment
from pareto_runner.selftest.checks import BOUNDS, Bound, Check, make_spec, run_checks, terminal_table
from pareto_runner.selftest.device import Device
from pareto_runner.selftest.diary import COLD, Diary, Facts
from pareto_runner.selftest.experiment import Pair, allowed, summarise
from pareto_runner.selftest.models import MIB, resident_exactly, spike


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> list[Check]:
    return run_checks(tmp_path_factory.mktemp("selftest"))


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.key)
def test_the_instruments_report_what_the_workload_saw(checks: list[Check], bound: Bound) -> None:
    check = next(check for check in checks if check.bound is bound)
    if check.real is None:
        assert bound.key == "peak.cuda"
        pytest.skip(check.skipped)
    assert check.ok, f"{bound.name}: truth {check.real[0]:.4g} {bound.unit}, reported {check.real[1]:.4g}"


@pytest.mark.parametrize("kind", sorted({bound.kind for bound in BOUNDS}))
def test_a_naive_sampler_fails_checks_of_every_kind(checks: list[Check], kind: str) -> None:
    taken = [check for check in checks if check.bound.kind == kind and check.real is not None]
    assert all(check.naive is not None for check in taken)
    assert not all(check.naive_ok for check in taken)


def test_checks_can_be_kept_and_shown(checks: list[Check]) -> None:
    kept = json.loads(json.dumps([check.to_json() for check in checks]))
    assert [item["bound"]["key"] for item in kept] == [bound.key for bound in BOUNDS]
    text = io.StringIO()
    Console(file=text, width=120).print(terminal_table(checks))
    assert all(bound.name in text.getvalue() for bound in BOUNDS)


@pytest.mark.parametrize(
    ("bound", "reading", "error", "ok"),
    [
        (Bound("k", "latency", "n", "ms", 0.05), (10.0, 10.4), 0.04, True),
        (Bound("k", "latency", "n", "ms", 0.05), (10.0, 9.4), 0.06, False),
        (Bound("k", "host memory", "n", "MiB", 2.0, relative=False), (500.0, 501.5), 1.5, True),
        (Bound("k", "host memory", "n", "MiB", 2.0, relative=False), (500.0, 497.0), 3.0, False),
        (Bound("k", "device memory", "n", "MiB", 0.0, relative=False), (40.0, 40.0), 0.0, True),
        (Bound("k", "device memory", "n", "MiB", 0.0, relative=False), (40.0, 40.0 + 2**-20), 2**-20, False),
    ],
)
def test_a_check_compares_as_its_bound_says(bound: Bound, reading: tuple[float, float], error: float, ok: bool) -> None:
    check = Check(bound, reading, reading)
    assert check.error(reading) == pytest.approx(error)
    assert check.ok is check.naive_ok is ok


def test_the_truth_is_read_from_the_diaries_without_the_first_calls(tmp_path: Path) -> None:
    diary, facts = Diary(tmp_path), Facts(tmp_path)
    diary.write("born", 0, 100 * MIB, 0.0, 0.0)
    for number in range(len(COLD) + 4):
        slow = 9.0 if number < len(COLD) else 0.0
        # The prompt takes 2 s; two tokens then come together, and the last a second later.
        start = 20.0 * number
        diary.write(
            "tell", number, (101 + number) * MIB, start, *(start + slow + t for t in (2.0, 2.5, 2.5, 3.5)), 99.0
        )
    assert facts.read().count("tell") == 0  # not on the disk yet
    diary.keep()
    truth = facts.read()
    assert truth.first_token_ms("tell") == pytest.approx(2000.0)
    assert truth.next_token_ms("tell") == pytest.approx(500.0)
    assert truth.peak_mib("tell") == 109.0
    assert truth.peak_mib("tell", above="born") == 9.0
    assert facts.read().count("tell") == 0  # each event is read once


def test_the_truth_counts_the_calls_that_were_reported_on(tmp_path: Path) -> None:
    diary, facts = Diary(tmp_path), Facts(tmp_path)
    for number in range(20):
        diary.write("call", number, 0, float(number), number + (0.5 if number < 15 else 0.25))
    diary.keep()
    truth = facts.read({"call": 5})
    assert truth.latency_ms("call") == 250.0
    assert truth.items_per_second("call", 3) == 12.0
    assert truth.total_seconds("call") == 19.25


def test_each_moment_counts_the_same_however_many_calls_it_saw(tmp_path: Path) -> None:
    diary, facts = Diary(tmp_path), Facts(tmp_path)
    times = [0.001 * number for number in range(40)] + [10.0, 20.0]
    for number, start in enumerate(times, start=len(COLD)):
        diary.write("call", number, 0, start, start + (0.001 if start < 1 else 0.1))
    diary.keep()
    assert facts.read().latency_ms("call") == pytest.approx(100.0)


def test_the_device_works_while_its_caller_goes_on_and_counts_its_memory() -> None:
    device, ends = Device(), []
    start = time.perf_counter()
    for _ in range(3):
        device.launch(0.02, ends.append)
    returned = time.perf_counter()
    device.synchronize()
    assert len(ends) == 3
    assert returned < ends[0]
    assert ends[-1] - start >= 0.06
    device.allocate(10)
    device.allocate(5)
    device.free(12)
    assert (device.allocated_bytes, device.peak_bytes) == (3, 15)
    device.reset_peak()
    assert device.peak_bytes == 3


def test_a_spike_is_as_high_as_it_says_and_leaves_nothing() -> None:
    before = resident_exactly()
    reset_host_peak()
    top = spike(48 * MIB)
    assert abs(peak_host_bytes() - top) < 2 * MIB
    assert top - before < 49 * MIB
    assert resident_exactly() - before < 2 * MIB


def test_no_list_of_targets_shows_the_pretended_device() -> None:
    assert "selftest" not in discover.TARGETS
    assert discover.make_target("selftest").probe().available


def pair(kind: Any, verdict: str, seconds: float = 12.0) -> Pair:
    return Pair(kind, verdict, 1.0, 0.99, 1.01, 0.01, 30, seconds - 5, seconds)


@pytest.mark.parametrize("count", [0, 1, 20, 100, 400])
def test_as_many_false_verdicts_are_allowed_as_the_binomial_says(count: int) -> None:
    assert allowed(count) == (binom.ppf(0.99, count, 0.05) if count else 0)


def test_the_summary_counts_false_verdicts_and_slow_downs_that_were_found_in_time() -> None:
    equal = [pair("equal", "inconclusive")] * 97 + [
        pair("equal", "worse"),
        pair("equal", "better"),
        pair("equal", "worse"),
    ]
    slower = [pair("slower", "worse")] * 36 + [pair("slower", "inconclusive")] * 2 + [pair("slower", "better")]
    late = [pair("slower", "worse", seconds=60.5)]
    found = summarise([*equal, *slower, *late])
    assert (found.equal, found.false_verdicts, found.false_verdicts_allowed) == (100, 3, 11)
    assert (found.slower, found.found, found.found_needed) == (40, 36, 36)
    assert (found.longest_seconds, found.ok) == (60.5, True)
    assert json.loads(json.dumps(found.to_json()))["ok"] is True
    assert not summarise([*equal, *slower[1:], *late]).ok
    assert not summarise([*equal, *[pair("equal", "better")] * 20, *slower, *late]).ok


def test_an_experiment_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def take(kind: Any, artifacts: Any) -> Pair:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(kind)
        assert [artifact.spec.variant for artifact in artifacts] == ["baseline", kind]
        return pair(kind, "worse" if kind == "slower" else "inconclusive")

    monkeypatch.setattr(experiment, "_take", take)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(tmp_path, pairs=2, planted=3)
    journal = tmp_path / "pairs.jsonl"
    journal.write_text(journal.read_text() + '{"kind": "slow')  # the last line was cut short
    taken.clear()
    found = experiment.run(tmp_path, pairs=2, planted=3)
    assert taken == ["slower", "slower"]
    assert (found.equal, found.found, found.ok) == (2, 3, True)


def test_the_planted_slow_down_is_a_tenth_more_of_the_same_work(tmp_path: Path) -> None:
    task = discover.make_task(make_spec("compute", tmp_path, 1.0).task)
    request = task.requests()["matmuls"]
    for name, matmuls in (("baseline", 10), ("equal", 10), ("slower", 11)):
        artifact = experiment._prepare(tmp_path, name, 1.0)
        model: Any = discover.make_method(artifact.spec.stages[0].methods[0]).load(artifact.directory / "deployed")
        product = model._weight[: request.batch_size]
        for _ in range(matmuls):
            product = product @ model._weight
        assert torch.equal(model(**request.inputs).logits, product)


@pytest.mark.parametrize(("pairs", "planted"), [(0, 0), (1, 1)])
def test_the_command_says_whether_all_is_well_and_keeps_what_it_found(
    pairs: int, planted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = Bound("k", "latency", "a call", "ms", 0.05)
    good, bad = Check(bound, (10.0, 10.1), None), Check(bound, (10.0, 11.0), None)
    for check, right in ((good, True), (bad, False)):
        verdict = "worse" if right else "inconclusive"
        monkeypatch.setattr(selftest.checks, "run_checks", lambda *_, check=check, **__: [check])
        monkeypatch.setattr(
            experiment, "_take", lambda kind, _, v=verdict: pair(kind, v if kind == "slower" else "inconclusive")
        )
        out = tmp_path / str(right)
        assert selftest.run(out, pairs, planted, Console(quiet=True)) is right
        kept = json.loads((out / ("summary.json" if pairs else "checks.json")).read_text())
        assert (kept if pairs else kept[0])["ok"] is right
