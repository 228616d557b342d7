"""Taking turns, with workers that are played by this process: how long is sampled, what is compared, who drops out."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pareto_core import MethodSpec, Result, RunSpec, Stage, TaskRef
from pareto_runner import turns
from pareto_runner.isolate import ChildError
from pareto_runner.run import Artifact
from pareto_runner.turns import Crew, timing

#: milliseconds of the calls of a turn, by the number of the turn (warm-up included)
Script = Callable[[int], list[float]]


class PlayedWorker:
    """Answers as a worker does, with the times of a script; dies where the script raises."""

    def __init__(self, script: Script, commands: list[str], peaks: list[float], repeats: int) -> None:
        self._script, self._commands, self._peaks, self._repeats = script, commands, peaks, repeats
        self._turn = 0
        self._asked: dict[str, Any] = {}

    def send(self, **command: Any) -> None:
        self._asked = command

    def answer(self) -> dict[str, Any]:
        return self.ask(**self._asked)

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        self._commands.append(do)
        if do == "load":
            return {"requests": {"one": {"batch_size": 4, "repeats": self._repeats}}, "peak_mib": 7.0}
        if do == "train":
            self._turn = 0
            return {"trains": bool(self._script(0))}
        if do == "choose":
            return {"difference": 0.0, "peak_mib": 3.0}
        if do == "peak":
            return {"peak_mib": self._peaks.pop(0)}
        self._turn += 1
        return {"times": [milliseconds / 1000 for milliseconds in self._script(self._turn - 1)]}

    def close(self) -> None:
        self._commands.append("close")


class Cast:
    """Puts played workers in the place of processes: one per variant, and the control, by the name of their log."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = tmp_path
        self._scripts: dict[str, Script] = {}
        self._repeats = 0
        self.commands: dict[str, list[str]] = {}
        monkeypatch.setattr(turns, "Child", self._child)

    def _child(self, command: Any, log: Path, variables: Any, limit: Any) -> PlayedWorker:
        name = log.parent.name + ("-control" if "control" in log.name else "")
        commands = self.commands.setdefault(name, [])
        return PlayedWorker(self._scripts[name], commands, [5.0, 2.0], self._repeats)

    def crew(self, scripts: dict[str, Script], seconds: float = 60.0, repeats: int = 0, **spec: Any) -> Crew:
        """A crew of variants; "base" is the baseline of all others. It has loaded."""
        self._scripts, self._repeats = scripts, repeats
        names = [name for name in scripts if not name.endswith("-control")]
        crew = Crew([self._artifact(name, seconds, "base" in names and name != "base", **spec) for name in names])
        crew.load()
        return crew

    def _artifact(self, name: str, seconds: float, compared: bool, **changes: Any) -> Artifact:
        spec = RunSpec(
            question="q",
            variant=name,
            stages=(Stage(methods=(MethodSpec(name="m"),)),),
            task=TaskRef(name="t"),
            target="xeon",
            baseline="base" if compared else None,
            measure_seconds=seconds,
            **changes,
        )
        return Artifact(self._path / name, Result(spec=spec, status="ok"))


@pytest.fixture
def cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cast:
    return Cast(tmp_path, monkeypatch)


def wobble(milliseconds: float, by: float, period: int = 5) -> Script:
    """Three calls a turn, whose length wobbles by a share ``by``."""
    return lambda turn: [milliseconds * (1 + by * ((turn % period) / (period - 1) - 0.5))] * 3


def test_sampling_ends_once_every_interval_is_tight(cast: Cast) -> None:
    steady = {"base": wobble(4.0, 0.004), "base-control": wobble(4.0, 0.004), "new": wobble(2.0, 0.004)}
    crew = cast.crew(steady)
    crew.time_request("one")
    base, new = crew.results()
    # Two rounds of warm-up that agree, then twice the least number of rounds.
    assert cast.commands["new"].count("turn") == 2 + 20
    assert new.value("latency_ms.one") == pytest.approx(2.0, rel=0.01)
    assert new.value("throughput.one") == pytest.approx(2000.0, rel=0.01)
    (found,) = new.comparisons
    assert (found.name, found.baseline, found.pairs, found.verdict) == ("latency_ms.one", "base", 20, "better")
    assert [(c.name, c.verdict) for c in base.comparisons] == [("control.latency_ms.one", "inconclusive")]


@pytest.mark.parametrize("wide", ["base", "new"])
def test_one_wide_interval_keeps_all_at_it_until_the_budget_ends(cast: Cast, wide: str) -> None:
    scripts = {name: wobble(4.0, 0.3 if name == wide else 0.0, 7) for name in ("base", "base-control", "new")}
    crew = cast.crew(scripts, seconds=0.2)
    crew.time_request("one")
    (found,) = crew.results()[1].comparisons
    assert found.pairs > 20


def test_a_budget_that_is_spent_at_once_still_takes_ten_rounds(cast: Cast) -> None:
    crew = cast.crew({"base": wobble(4.0, 0.5)}, seconds=1e-6)
    crew.time_request("one")
    assert cast.commands["base"].count("turn") == 2 + 10


def test_warming_up_goes_on_until_two_rounds_agree_and_is_not_counted(cast: Cast) -> None:
    cooling = [40.0, 30.0, 20.0, 10.0, 4.0]
    crew = cast.crew({"base": lambda turn: [cooling[turn]] if turn < 5 else [4.0]})
    crew.time_request("one")
    (result,) = crew.results()
    # The sixth round is the first like the one before it.
    assert cast.commands["base"].count("turn") == 6 + 20
    measured = result.measurement("latency_ms.one")
    assert measured is not None
    assert (measured.value, measured.samples, measured.interval_high) == (4.0, 20, 4.0)


def test_warming_up_ends_after_ten_rounds_that_never_agree(cast: Cast) -> None:
    crew = cast.crew({"base": lambda turn: [2.0**turn if turn < 10 else 1.0]})
    crew.time_request("one")
    assert cast.commands["base"].count("turn") == 10 + 20


def test_a_worker_that_dies_in_a_round_leaves_the_others_in_step(cast: Cast) -> None:
    """All times follow one drift, so that any two that are compared across rounds would differ by a tenth."""

    def drift(turn: int) -> list[float]:
        return [1.0 * 1.1**turn]

    def dies(turn: int) -> list[float]:
        if turn == 17:
            raise ChildError("the process was killed by SIGKILL", log="last words")
        return drift(turn)

    crew = cast.crew({"base": drift, "base-control": drift, "short": dies, "new": drift}, seconds=0.02)
    crew.time_request("one")
    base, short, new = crew.results()
    assert (short.status, short.reason, short.log) == ("failed", "the process was killed by SIGKILL", "last words")
    assert cast.commands["short"][-1] == "close"
    (found,) = new.comparisons
    assert (found.ratio, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    assert base.status == new.status == "ok"


def test_turns_are_compared_by_the_number_of_their_round(cast: Cast) -> None:
    crew = cast.crew({"base": wobble(1.0, 0.0), "base-control": wobble(1.0, 0.0), "new": wobble(1.0, 0.0)})
    for member in crew._members:
        member.turns = {number: {"times": [1.1**number]} for number in range(20)}
    absent = next(member for member in crew._members if member.name == "new")
    del absent.turns[3], absent.turns[11]
    found = dict(crew._comparisons("latency"))["new"]
    assert (found.pairs, found.ratio) == (18, 1.0)


def test_the_control_gives_the_margin_of_every_verdict(cast: Cast) -> None:
    """The control is slower by 4 %, so that 3 % are nothing; 12 % are."""
    flat = {"base": 4.0, "base-control": 4.16, "near": 4.12, "far": 4.48}
    crew = cast.crew({name: wobble(value, 0.0) for name, value in flat.items()})
    crew.time_request("one")
    base, near, far = crew.results()
    assert [(c.verdict, c.margin) for c in base.comparisons] == [("worse", 0.01)]
    assert [(c.verdict, round(c.margin, 6)) for c in near.comparisons] == [("inconclusive", 0.04)]
    assert [(c.verdict, round(c.margin, 6)) for c in far.comparisons] == [("worse", 0.04)]


def test_rivals_are_compared_too_and_nobody_with_himself(cast: Cast) -> None:
    scripts = {name: wobble(4.0, 0.0) for name in ("base", "base-control", "a", "b")}
    crew = cast.crew(scripts, rivals=("a", "base"))
    crew.time_request("one")
    compared = {result.spec.variant: [c.baseline for c in result.comparisons] for result in crew.results()}
    assert compared == {"base": ["base", "a"], "a": ["base"], "b": ["base", "a"]}


def test_without_a_baseline_there_is_no_control_and_no_comparison(cast: Cast) -> None:
    crew = cast.crew({"a": wobble(4.0, 0.0), "b": wobble(4.0, 0.0)})
    crew.time_request("one")
    assert [result.comparisons for result in crew.results()] == [(), ()]
    assert "a-control" not in cast.commands


def test_peaks_are_the_highest_of_all_requests_and_of_loading_their_own(cast: Cast) -> None:
    crew = cast.crew({"base": wobble(4.0, 0.0)})
    for _ in range(2):  # the first call took 3, its turns 5; then 3 and 2
        crew.time_request("one")
    (result,) = crew.results()
    assert result.value("inference_peak_mib") == 5.0
    assert result.value("load_peak_mib") == 7.0


def test_a_fixed_protocol_gives_its_mean_and_no_interval_of_a_median(cast: Cast) -> None:
    crew = cast.crew({"base": lambda turn: [1.0, 2.0, 6.0]}, repeats=3)
    crew.time_request("one")
    (result,) = crew.results()
    measured = result.measurement("latency_ms.one")
    assert measured is not None
    assert (measured.value, measured.samples) == (pytest.approx(3.0), 9)
    assert measured.interval_low is measured.interval_high is None
    assert cast.commands["base"].count("protocol") == 3


def test_training_is_warmed_up_once_and_turns_hold_as_many_steps_as_fill_them(cast: Cast) -> None:
    crew = cast.crew({"base": lambda turn: [400.0 if turn == 0 else 10.0]})
    crew.start_training()
    crew.time_training()
    (result,) = crew.results()
    assert result.value("train_step_ms") == 10.0
    assert cast.commands["base"].count("steps") == 3 + 20


def test_a_variant_that_trains_nothing_keeps_what_was_timed_and_leaves(cast: Cast) -> None:
    def prompted(turn: int) -> list[float]:
        return [] if "train" in cast.commands["prompted"] else [5.0] * 3

    crew = cast.crew({"base": wobble(10.0, 0.02), "base-control": wobble(10.0, 0.02), "prompted": prompted})
    crew.time_request("one")
    crew.start_training()
    crew.time_training()
    base, other = crew.results()
    assert other.status == "ok"
    assert other.value("latency_ms.one") == 5.0
    assert "train_step_ms" not in {item.name for item in other.measurements}
    assert base.value("train_step_ms") == pytest.approx(10.0, rel=0.05)
    assert cast.commands["prompted"][-1] == "close"


def test_the_value_and_its_interval_come_from_the_turns_and_the_spread_from_the_calls() -> None:
    """One slow turn of many calls moves neither value nor interval, since a turn counts once."""
    found = timing("t", [[0.001, 0.003, 0.002]] * 26 + [[0.9] * 100])
    assert (found.value, found.interval_low, found.interval_high, found.samples) == (2.0, 2.0, 2.0, 178)
    assert (found.low, found.high) == (1.0, 900.0)
    few = timing("t", [[0.001, 0.002, 0.003]] * 5)
    assert (few.value, few.interval_low, few.interval_high, few.low, few.high) == (2.0, None, None, None, None)


def test_the_median_of_the_turns_lies_in_its_interval_however_the_calls_are_spread() -> None:
    lists = [[0.001 * (turn + call) for call in range(turn + 1)] for turn in range(30)]
    found = timing("t", lists)
    assert found.value == pytest.approx(1000 * statistics.median(statistics.median(turn) for turn in lists))
    assert found.interval_low is not None
    assert found.interval_high is not None
    assert found.interval_low <= found.value <= found.interval_high
