"""Times taken in turns, ratios of their medians with intervals, and what happens when memory ends."""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pareto_core import ModelError

#: seconds that the timed steps of one turn take together, where they are shorter than that
TURN = 0.02
#: seconds from which a step is so long that what ran before it leaves no mark on it
LONG = 0.25
RESAMPLES = 2000
OUT_OF_MEMORY = "out of memory"
DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to time: ``forward`` returns a tensor, whose gradient with respect to ``inputs`` is the backward."""

    forward: Callable[[], torch.Tensor]
    inputs: Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, by the percentile bootstrap over turns."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of a table: a case at a place (lengths, widths, …), forward or backward.

    ``ratio`` is what the table compares (see its text), against ``base``; ``bound`` is what it could be at most.
    ``problem`` says why there is no figure.
    """

    table: str
    case: str
    direction: str
    place: dict[str, int | str]
    milliseconds: Estimate | None = None
    base: str = ""
    ratio: Estimate | None = None
    bound: Estimate | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to time: where, how long for each group of cases, and at least how many turns."""

    device: str = "cpu"
    seconds: float = 10.0
    fewest: int = 12


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each case, arrays (turns,) by direction; cases that did not fit into memory are in ``failed``."""

    seconds: dict[str, dict[str, np.ndarray]]
    failed: tuple[str, ...] = ()

    def milliseconds(self, case: str, direction: str) -> Estimate:
        """Median over turns."""
        return estimate(lambda times: np.median(times, axis=-1), 1e3 * self.seconds[case][direction])

    def speedup(self, case: str, base: str, direction: str) -> Estimate | None:
        """Ratio of the base's median to the case's; None where the base has no times."""
        if base not in self.seconds:
            return None
        return estimate(ratio_of_medians, self.seconds[base][direction], self.seconds[case][direction])


def ratio_of_medians(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Median of ``over`` to median of ``under``, both along the last axis."""
    ratio: np.ndarray = np.median(over, axis=-1) / np.median(under, axis=-1)
    return ratio


def estimate(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> Estimate:
    """``statistic`` of ``columns`` (turns), which are resampled together; it reduces the last axis of its arguments."""
    picks = np.random.default_rng(0).integers(0, len(columns[0]), (RESAMPLES, len(columns[0])))
    low, high = np.quantile(statistic(*(column[picks] for column in columns)), [0.025, 0.975])
    return Estimate(float(statistic(*columns)), float(low), float(high))


def take_turns(cases: Mapping[str, Case], settings: Settings, done: Callable[[float], None] | None = None) -> Times:
    """Time every case in turns whose order rotates, for about ``settings.seconds``; ``done`` is told the share.

    A turn is one step that is not counted (unless steps are long), then as many as fill a fiftieth of a second. What
    disturbs the machine for a while hits all cases of a round. Cases that run out of memory are left out.
    """
    lengths: dict[str, float] = {}
    failed: list[str] = []
    for name, case in cases.items():
        found = _within_memory(lambda case=case: [_timed(case, 1, settings.device) for _ in range(2)])
        if found is None:
            failed.append(name)
        else:
            lengths[name] = max(sum(found[-1]), 1e-9)
    names = list(lengths)
    one = sum(length if length >= LONG else length + max(length, TURN) for length in lengths.values())
    rounds = max(settings.fewest, round(settings.seconds / one)) if names else 0
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if lengths[name] < LONG:
                _timed(cases[name], 1, settings.device)
            times[name].append(_timed(cases[name], max(1, math.ceil(TURN / lengths[name])), settings.device))
        if done is not None:
            done((number + 1) / rounds)
    seconds = {name: dict(zip(DIRECTIONS, np.array(values).T, strict=True)) for name, values in times.items() if values}
    return Times(seconds, tuple(failed))


def speedups(table: str, place: dict[str, int | str], times: Times, base: str, bound: str = "") -> list[Row]:
    """Rows of a group: each case's time, how many times faster than ``base`` it is, and could be (``bound``'s)."""
    rows = [
        Row(
            table,
            case,
            direction,
            place,
            times.milliseconds(case, direction),
            base,
            times.speedup(case, base, direction),
            times.speedup(bound, base, direction) if bound in times.seconds else None,
        )
        for case in times.seconds
        for direction in DIRECTIONS
    ]
    return rows + [Row(table, case, way, place, problem=OUT_OF_MEMORY) for case in times.failed for way in DIRECTIONS]


def _timed(case: Case, times: int, device: str) -> tuple[float, float]:
    """Seconds of one forward and of one backward, means over ``times`` steps."""
    ahead = back = 0.0
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        output = case.forward()
        synchronize(device)
        ahead += time.perf_counter() - start
        direction = torch.ones_like(output)
        synchronize(device)
        start = time.perf_counter()
        torch.autograd.grad(output, case.inputs, direction)
        synchronize(device)
        back += time.perf_counter() - start
        del output, direction
    return ahead / times, back / times


def synchronize(device: str) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _within_memory(call: Callable[[], list[tuple[float, float]]]) -> list[tuple[float, float]] | None:
    """What ``call`` returns, or None where memory does not suffice; other errors pass."""
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed, on a GPU or on a CPU."""
    words = ("out of memory", "can't allocate memory", "bad_alloc")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def limit_memory(gibibytes: float) -> None:
    """Let allocations fail, rather than have the system end the process, beyond ``gibibytes`` more than now."""
    now = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    most = int(now.split()[1]) * 1024 + int(gibibytes * 2**30)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def require_close(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise :class:`ModelError` where ``found`` is off by more than ``tolerance`` of the largest expected value."""
    if found.shape != expected.shape:
        raise ModelError(f"{what} has shape {tuple(found.shape)}, not {tuple(expected.shape)}: not timed")
    scale = float(expected.abs().max())
    off = float((found.to(expected.dtype) - expected).abs().max()) / max(scale, 1e-30)
    if not off <= tolerance:  # NaN is refused too
        raise ModelError(f"{what} is off by {off:.1e} of its largest value, more than {tolerance:.0e}: not timed")


def answers(case: Case) -> tuple[torch.Tensor, ...]:
    """The output of ``case``, and the gradients of a fixed projection of it with respect to its inputs."""
    output = case.forward()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(output.shape, generator=generator).to(output)
    return output.detach(), *torch.autograd.grad(output, case.inputs, direction)
