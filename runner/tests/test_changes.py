"""Comparing two sides: verdicts against planted changes, machines, what cannot be compared, commits, exit codes."""

from __future__ import annotations

import dataclasses
import math
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from rich.console import Console

from pareto_core import DataError, Measurement, ParetoError, Result
from pareto_core.errors import UnknownNameError
from pareto_runner import changes
from pareto_runner.changes import Change, compare_journals, exit_code
from pareto_runner.journal import Journal

SAMPLES = runpy.run_path(str(Path(__file__).with_name("samples.py")))
ok, failed, suite, compare = (SAMPLES[name] for name in ("ok", "failed", "suite", "compare"))
KRONA, FULL = "KronA (24, 16)", "Full fine-tuning"


def of(found: list[Change], variant: str = KRONA) -> dict[str, Change]:
    return {change.figure: change for change in found if change.variant == variant}


def scaled(result: Result, name: str, factor: float) -> Result:
    """The result with one measurement and its interval multiplied."""

    def times(item: Measurement) -> Measurement:
        ends = {"interval_low": item.interval_low, "interval_high": item.interval_high}
        grown = {key: value if value is None else factor * value for key, value in ends.items()}
        return dataclasses.replace(item, value=factor * item.value, **grown) if item.name == name else item

    return dataclasses.replace(result, measurements=tuple(map(times, result.measurements)))


def changed(results: list[Result], change: Callable[[Result], Result], variant: str = KRONA) -> list[Result]:
    return [change(result) if result.spec.variant == variant else result for result in results]


def test_a_journal_against_itself() -> None:
    found = compare_journals(suite(3), suite(3))
    assert {change.verdict for change in found} == {"inconclusive"}
    assert all(change.change == (1 if change.relative else 0) for change in found)
    assert exit_code(found) == 0
    assert {"accuracy", "latency_ms.batch1", "train_step_ms", "train_peak_mib", "trainable_parameters"} <= set(
        of(found)
    )


def test_a_quotients_interval_is_exact_for_lognormal_figures() -> None:
    def figure(value: float, deviation: float) -> tuple[float, float, float]:
        return value, value * math.exp(-1.96 * deviation), value * math.exp(1.96 * deviation)

    # independent normal logarithms: variances add
    expected = figure(2.0, math.sqrt(0.03**2 + 0.04**2))
    assert changes.quotient(figure(4.0, 0.03), figure(8.0, 0.04)) == pytest.approx(expected)


def test_a_quotients_interval_takes_the_sides_that_move_it() -> None:
    value, low, high = changes.quotient((1.0, 0.5, 1.0), (1.0, 1.0, 1.0))  # before may have been smaller
    assert (value, low, high) == pytest.approx((1.0, 1.0, 2.0))


def test_a_slower_variant_is_found_against_its_baseline() -> None:
    def slower(result: Result) -> Result:
        others = [item for item in result.comparisons if item.name != "latency_ms.batch1"]
        return dataclasses.replace(result, comparisons=(compare("latency_ms.batch1", 1.10), *others))

    found = compare_journals(suite(3), changed(suite(3), slower))
    change = of(found)[f"latency_ms.batch1 against {FULL}"]
    # before: 1.002, 1.003, 1.004, each ± 0.01; after: 1.10 ± 0.01
    assert change.before == pytest.approx((1.002 * 1.003 * 1.004) ** (1 / 3))
    assert change.change == pytest.approx(1.10 / change.before)
    assert change.low == pytest.approx(
        change.change / math.exp(math.hypot(math.log(1.1 / 1.09), math.log(1.014 / 1.003))), rel=1e-4
    )
    assert change.margin == pytest.approx(0.0201)  # either side's 1 %
    assert change.verdict == "worse"
    assert {c.verdict for c in found if c is not change} == {"inconclusive"}
    assert exit_code(found) == 1
    back = of(compare_journals(changed(suite(3), slower), suite(3)))[f"latency_ms.batch1 against {FULL}"]
    assert back.verdict == "better"


@pytest.mark.parametrize(
    ("factor", "seeds", "verdict"),
    [(1.5, 3, "worse"), (0.6, 3, "better"), (1.15, 3, "inconclusive"), (1.5, 1, "inconclusive")],
)
def test_times_as_they_stand_need_several_sessions_and_a_large_change(factor: float, seeds: int, verdict: str) -> None:
    after = [scaled(result, "latency_ms.batch1", factor) for result in suite(seeds)]
    for variant in (KRONA, FULL):
        change = of(compare_journals(suite(seeds), after), variant)["latency_ms.batch1"]
        assert change.change == pytest.approx(factor)
        assert (change.verdict, change.margin) == (verdict, 0.20)
        assert change.note == ("one session a side" if seeds == 1 else "")


def test_seeds_that_lie_apart_widen_the_interval() -> None:
    loaded = [scaled(r, "latency_ms.batch1", 1 + 0.4 * r.spec.seed) for r in suite(3)]  # 1, 1.4 and 1.8 times as long
    change = of(compare_journals(suite(3), loaded))["latency_ms.batch1"]
    assert change.change == pytest.approx(1.4)
    assert change.low is not None
    assert change.low < 1.0
    assert change.verdict == "inconclusive"


def test_times_without_an_interval_are_not_compared() -> None:
    bare = dataclasses.replace(ok(KRONA), measurements=(Measurement(name="latency_ms.batch1", value=4.0, unit="ms"),))
    change = of(compare_journals([bare], [bare]))["latency_ms.batch1"]
    assert (change.verdict, change.change, change.before) == (None, None, 4.0)
    assert "no interval" in change.note


def test_different_machines_are_compared_only_where_that_is_asked_for() -> None:
    newer = {**SAMPLES["MACHINE"], "libraries": {"torch": "2.15.0"}}
    after = [dataclasses.replace(scaled(r, "latency_ms.batch1", 2.0), machine=newer) for r in suite(3)]
    found = of(compare_journals(suite(3), after))
    assert set(found) == {"accuracy", "weight_mib", "trainable_parameters", "times and peaks"}
    assert "different machines" in found["times and peaks"].note
    assert found["accuracy"].verdict == "inconclusive"  # the same items, wherever they were scored
    asked = of(compare_journals(suite(3), after, across_machines=True))
    assert asked["latency_ms.batch1"].verdict == "worse"
    assert asked["latency_ms.batch1"].note == "different machines"
    assert asked["latency_ms.batch1"].machine.endswith("2 cores → the same model, set up differently")


def test_each_machine_that_both_sides_know_is_compared() -> None:
    other = {"cpu": "Another CPU", "cores": 4}
    both = [*suite(2), *(dataclasses.replace(result, machine=other) for result in suite(2))]
    slow = [scaled(r, "latency_ms.batch1", 2.0) if r.machine == other else r for r in both]
    found = [c for c in compare_journals(both, slow) if c.figure == "latency_ms.batch1" and c.variant == KRONA]
    assert {change.machine.split(" · ")[0]: change.verdict for change in found} == {
        SAMPLES["MACHINE"]["cpu"]: "inconclusive",
        "Another CPU": "worse",
    }


def test_a_lower_score_is_found_by_the_same_items() -> None:
    generator = np.random.default_rng(3)

    def worse(result: Result) -> Result:
        moved = np.array(result.resampled) - 2 + generator.normal(0, 0.3, len(result.resampled))
        lower = scaled(result, "accuracy", 1 - 2 / result.value("accuracy"))
        return dataclasses.replace(lower, resampled=tuple(moved.round(6).tolist()))

    before, after = suite(3), changed(suite(3), worse)
    change = of(compare_journals(before, after))["accuracy"]
    mine = [[np.array(r.resampled) for r in side if r.spec.variant == KRONA] for side in (before, after)]
    low, high = np.quantile(np.mean(mine[1], axis=0) - np.mean(mine[0], axis=0), [0.025, 0.975])
    assert (change.before, change.after, change.change) == pytest.approx((68.8, 66.8, -2.0))
    assert (change.low, change.high) == pytest.approx((low, high), abs=1e-3)
    assert change.verdict == "worse"
    assert of(compare_journals(after, before))["accuracy"].verdict == "better"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"data": {"corpus": "another"}}, "the data differ"),
        ({"resampled": ()}, "a side has no resampled scores"),
        ({"metric": "f1"}, "a side has no score"),
        ({"spec": SAMPLES["spec"](KRONA, 7)}, "no seed in common"),
    ],
)
def test_scores_that_cannot_be_paired_say_why(values: dict[str, Any], reason: str) -> None:
    found = of(compare_journals([ok(KRONA)], [dataclasses.replace(ok(KRONA), **values)]))
    change = next(change for change in found.values() if not change.relative)
    assert (change.verdict, change.note) == (None, f"not compared: {reason}")


@pytest.mark.parametrize(
    ("name", "factor", "verdict"),
    [
        ("train_peak_mib", 1.20, "worse"),
        ("train_peak_mib", 0.80, "better"),
        ("train_peak_mib", 1.08, "inconclusive"),
        ("trainable_parameters", 1.001, "worse"),
        ("weight_mib", 0.5, "better"),
    ],
)
def test_memory_and_parameters(name: str, factor: float, verdict: str) -> None:
    change = of(compare_journals(suite(2), changed(suite(2), lambda result: scaled(result, name, factor))))[name]
    assert change.change == pytest.approx(factor)
    assert change.verdict == verdict


def test_what_failed_or_was_mended() -> None:
    broken = failed(KRONA, "out of memory", 1)
    before, after = suite(2), [r for r in suite(2) if (r.spec.variant, r.spec.seed) != (KRONA, 1)] + [broken]
    found = of(compare_journals(before, after))["how it ended"]
    assert (found.verdict, found.note) == ("worse", "seed 1 failed: out of memory")
    assert exit_code(compare_journals(before, after)) == 1
    assert of(compare_journals(after, before))["how it ended"].verdict == "better"
    same = of(compare_journals([broken], [broken]))
    assert (same["how it ended"].verdict, len(same)) == (None, 1)
    absent = failed(KRONA, "no TPU", status="unsupported")
    gone = compare_journals([ok(KRONA)], [absent])
    assert (of(gone)["how it ended"].note, exit_code(gone)) == ("seed 0 unsupported, ok before: no TPU", 2)


def test_what_one_side_alone_holds_is_listed() -> None:
    found = compare_journals(suite(1)[:2], suite(1)[1:3])
    notes = {change.variant: change.note for change in found if change.figure == "variant"}
    assert notes == {FULL: "only before", "LoRA r=1": "only after"}
    nothing = compare_journals([ok(KRONA)], [ok("BitFit")])
    assert exit_code(nothing) == exit_code([]) == 2


def test_another_task_is_not_compared_and_another_method_is_told() -> None:
    spec = SAMPLES["spec"](KRONA)
    task = dataclasses.replace(spec.task, fields={"classes": 10})
    other = dataclasses.replace(ok(KRONA), spec=dataclasses.replace(spec, task=task))
    assert set(of(compare_journals([ok(KRONA)], [other]))) == {"task"}
    engine = dataclasses.replace(spec.engine, zero_stage=2)
    tuned = dataclasses.replace(ok(KRONA), spec=dataclasses.replace(spec, engine=engine))
    found = of(compare_journals([ok(KRONA)], [tuned]))
    assert found["specification"].note == "other engine"
    assert found["accuracy"].verdict == "inconclusive"


def test_the_later_result_of_a_seed_stands() -> None:
    found = of(compare_journals([failed(KRONA, "once"), ok(KRONA)], [ok(KRONA), ok(KRONA)]))
    assert "how it ended" not in found


@settings(max_examples=25, deadline=None)
@given(before=SAMPLES["odd_results"](), after=SAMPLES["odd_results"]())
def test_any_results_that_can_be_stored_can_be_compared(before: list[Result], after: list[Result]) -> None:
    found = compare_journals(before, after, across_machines=True)
    assert exit_code(found) in (0, 1, 2)
    assert changes.markdown(found)
    shown(found)


def shown(found: list[Change]) -> str:
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(changes.terminal_table(found))
    return console.export_text()


def test_both_texts_hold_every_row_and_what_it_says() -> None:
    evil = "a|b <script> [bold]x[/red]"
    after = [scaled(result, "train_peak_mib", 2.0) for result in suite(2)]
    found = compare_journals(suite(2), [*after, failed(evil, evil)])
    plain, text = shown(found), changes.markdown(found)
    lines = [" ".join(line.split()) for line in plain.splitlines()]
    krona = lines[lines.index(KRONA) :]
    # 708 MiB, known to 2 MiB on either side
    assert "Train peak (MiB) 708 1,416 ×2.000 [1.992, 2.008] ▼ worse" in krona
    # 4.018 ms in [3.968, 4.109] on both sides: the root of the squares of 1.25 % and 2.23 %
    assert "Latency batch 1 (ms) 4.02 4.02 ×1.000 [0.975, 1.026] ≈ ±20 %" in krona
    assert "a|b <script> [bold]x[/red], variant: only after" in lines
    assert text.index("Train peak (MiB)") < text.index("<details>") < text.index("Trainable parameters")
    assert f"| {KRONA} | Train peak (MiB) | 708 | 1,416 | ×2.000 \\[1.992, 2.008\\] | ±10 % | ▼ worse |" in text
    assert "a\\|b &lt;script&gt; \\[bold\\]x" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "Figure" not in line]
    assert len(rows) == len(found)
    assert "4 worse, 0 better" in changes.summary(found)


def at_commit(result: Result, commit: str, dirty: bool = False) -> Result:
    return dataclasses.replace(result, context={"commit": commit, "dirty": dirty})


def test_folders_and_commits(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results" / "journal")
    first, second = "a1b2" + "0" * 36, "a1b3" + "0" * 36
    results = [at_commit(ok("BitFit"), first), at_commit(ok(KRONA), second), at_commit(ok(FULL), second, dirty=True)]
    for result in results:
        journal.write(result)
    assert changes.pick(str(tmp_path / "results"), journal) == results
    assert changes.pick(str(tmp_path / "results" / "journal"), Journal(tmp_path)) == results
    assert changes.pick("a1b2", journal) == results[:1]
    assert changes.pick(second, journal) == results[1:2]
    assert changes.pick("a1b3-dirty", journal) == results[2:]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a1b2-dirty", "without uncommitted changes: name them a1b2"),
        ("c3", "known: a1b2"),
        ("no such branch", "known: a1b2"),
        ("--help", "known: a1b2"),
        ("a1b\0", "known: a1b2"),
        ("a" * 5000, "known: a1b2"),
    ],
)
def test_names_without_results(tmp_path: Path, name: str, message: str) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write(at_commit(ok(KRONA), "a1b2" + "0" * 36))
    with pytest.raises(ParetoError, match=message):
        changes.pick(name, journal)
    with pytest.raises(DataError, match="no results"):
        changes.pick(str(tmp_path.parent), journal)


def test_prefixes_that_several_commits_share() -> None:
    both = [at_commit(ok(KRONA), "a1b2c" + end * 35) for end in "01"]
    with pytest.raises(ParetoError, match="give more of the hash"):
        changes.of_commit(both, "a1b2")
    with pytest.raises(UnknownNameError):
        changes.of_commit(both, "a1b")  # too short to mean a commit


def test_a_branch_names_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "x"], ["branch", "release"]):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    result = at_commit(ok(KRONA), head)
    assert changes.of_commit([result], "release") == changes.of_commit([result], "HEAD") == [result]
