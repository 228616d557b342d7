"""Groups results into sections, and the seeds of a variant into one row.

How seeds are combined, as the legend of every table says:

- the score: mean over seeds with a 95 % Student interval from three seeds on, the extremes with two; with one the
  bootstrap interval over the test items;
- its difference to the baseline's: over the seeds that both have (compare.py), with one the paired bootstrap and
  McNemar's test;
- every other figure: the median over seeds; its interval reaches from the lowest lower to the highest upper bound of
  the seeds' intervals, its spread are the medians of their p10 and p90;
- a ratio to the baseline: geometric mean over seeds; its interval is the same envelope, its margin the largest, and
  there is a verdict only where every seed gives the same one. That is conservative.

Results of different machines never share a section, so nothing here is combined over machines.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pareto_core import Result
from pareto_core.result import Comparison, Difference, Measurement
from pareto_runner.wording import flat, show

#: two-sided 95 % quantiles of Student's distribution for 1 to 30 degrees of freedom
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
#: begins the names of comparisons of the baseline with itself
CONTROL = "control."
#: resampled scores that an interval of a single seed's score takes
FEWEST_RESAMPLES = 100
#: beyond this a number is a mistake that no mean or figure could hold
LARGEST = 1e30


@dataclasses.dataclass(frozen=True)
class Reference:
    """A table of the paper; ``columns`` name the values of ``rows``, whose keys are its row names."""

    table: str
    caption: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | str | None, ...]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class QuestionInfo:
    """What the benchmark file says of a question; ``ours`` maps a row of the references to the variant that it is."""

    name: str
    title: str = ""
    text: str = ""
    baseline: str | None = None
    references: tuple[Reference, ...] = ()
    ours: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure over the seeds of a variant.

    ``interval`` bounds the value with 95 % confidence; ``spread`` says how far single values lie apart: p10 and p90, or
    two seeds' scores.
    """

    value: float
    unit: str
    seeds: int
    interval: tuple[float, float] | None = None
    spread: tuple[float, float] | None = None
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """The seeds of one variant: ``ratios`` to the baseline by name, and how its score differs from the baseline's.

    ``rivals`` are the same for the other variants that it was compared with.
    """

    variant: str
    results: tuple[Result, ...]
    figures: dict[str, Figure]
    ratios: dict[str, Comparison]
    difference: Difference | None = None
    rivals: tuple[Comparison | Difference, ...] = ()

    @property
    def ok(self) -> list[Result]:
        """The seeds that ended well."""
        return [result for result in self.results if result.status == "ok"]

    @property
    def seeds(self) -> str:
        """How many seeds there are, and how many of them ended well."""
        count = len(self.results)
        words = "1 seed" if count == 1 else f"{count} seeds"
        return words if len(self.ok) == count or not self.ok else f"{len(self.ok)} of {words}"

    @property
    def problems(self) -> list[tuple[str, str]]:
        """Status and reason of each seed that did not end well, equal ones once."""
        return list(dict.fromkeys((result.status, result.reason) for result in self.results if result.status != "ok"))

    @property
    def score(self) -> Figure | None:
        """The task's score, None where no seed has one."""
        return self.figures.get(find_metric(self.ok))


@dataclasses.dataclass(frozen=True)
class Section:
    """One question on one machine, with one profile and target."""

    slug: str
    title: str
    info: QuestionInfo
    metric: str
    rows: tuple[Row, ...]
    machine: str
    facts: tuple[str, ...]

    @property
    def results(self) -> list[Result]:
        """All results of the section."""
        return [result for row in self.rows for result in row.results]


def combine_score(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean over seeds with its 95 % Student interval (three or more), the extremes (two), or nothing (one)."""
    scale = max(map(abs, values)) or 1.0  # so that no sum overflows
    parts = [value / scale for value in values]
    mean = scale * statistics.fmean(parts)
    if len(values) == 1:
        return mean, None, None
    if len(values) == 2:
        return mean, min(values), max(values)
    degrees = len(values) - 1
    quantile = STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96 + 2.4 / degrees
    half = scale * (quantile * statistics.stdev(parts) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def combine_ratio(comparisons: Sequence[Comparison]) -> Comparison:
    """Geometric mean of the seeds' ratios, the envelope of their intervals, and a verdict where all agree."""
    first = comparisons[0]
    agreed = {item.verdict for item in comparisons} == {first.verdict}
    return Comparison(
        name=first.name,
        baseline=first.baseline,
        ratio=statistics.geometric_mean([item.ratio for item in comparisons]),
        low=min(item.low for item in comparisons),
        high=max(item.high for item in comparisons),
        pairs=sum(item.pairs for item in comparisons),
        verdict=first.verdict if agreed else "inconclusive",
        margin=max(item.margin for item in comparisons),
    )


def make_row(variant: str, members: Mapping[str, Sequence[Result]], metric: str) -> Row:
    """Combine the seeds of one variant; only those that ended well give figures.

    ``members`` are the results of all variants of the section, for the differences of scores.
    """
    ok = [result for result in members[variant] if result.status == "ok"]
    measured: dict[str, list[Measurement]] = {}
    compared: dict[tuple[str, str], list[Comparison]] = {}
    for result in ok:
        for item in result.measurements:
            measured.setdefault(item.name, []).append(item)
        for ratio in result.comparisons:
            if 1 / LARGEST < ratio.ratio < LARGEST:
                compared.setdefault((ratio.name, ratio.baseline), []).append(ratio)
    figures = {name: _cost(items) for name, items in measured.items() if name != metric}
    if metric in measured:
        figures[metric] = _score(measured[metric], ok)
    baseline = next((result.spec.baseline for result in ok if result.spec.baseline != variant), None)
    combined = [combine_ratio(items) for items in compared.values()]
    ratios = {item.name: item for item in combined if item.baseline == baseline or item.name.startswith(CONTROL)}
    rivals = [item for item in combined if item.name not in ratios or ratios[item.name] is not item]
    names = dict.fromkeys(name for result in ok for name in (result.spec.baseline, *result.spec.rivals))
    found = [_difference(ok, members.get(name, ())) for name in names if name and name != variant]
    differences = {item.baseline: item for item in found if item is not None}
    return Row(
        variant=variant,
        results=tuple(members[variant]),
        figures=figures,
        ratios=ratios,
        difference=differences.pop(baseline, None) if baseline else None,
        rivals=(*differences.values(), *rivals),
    )


def _difference(ok: Sequence[Result], others: Sequence[Result]) -> Difference | None:
    """How a variant's score differs from another's over the seeds that both have."""
    from pareto_runner.compare import seeds_difference

    scored = [[result for result in side if result.status == "ok" and has_score(result)] for side in (ok, others)]
    return seeds_difference(*scored)


def has_score(result: Result) -> bool:
    """Whether a result has a score, and no figure that a mean could not hold."""
    value = result.value(result.metric)
    return value is not None and max(map(abs, (value, *result.resampled))) < LARGEST


def _cost(items: Sequence[Measurement]) -> Figure:
    """Combine one measurement other than the score over seeds."""
    lows = [item.low for item in items if item.low is not None]
    highs = [item.high for item in items if item.high is not None]
    return Figure(
        statistics.median(item.value for item in items),
        items[0].unit,
        len(items),
        interval=_envelope(items),
        spread=(statistics.median(lows), statistics.median(highs)) if lows and highs else None,
        compiled=any(item.kind == "compiled" for item in items),
    )


def _envelope(items: Sequence[Measurement]) -> tuple[float, float] | None:
    """From the lowest lower to the highest upper bound, None where a seed has no interval."""
    lows = [item.interval_low for item in items if item.interval_low is not None]
    highs = [item.interval_high for item in items if item.interval_high is not None]
    return (min(lows), max(highs)) if len(lows) == len(highs) == len(items) else None


def _score(items: Sequence[Measurement], ok: Sequence[Result]) -> Figure:
    """Combine the score over seeds."""
    value, low, high = combine_score([item.value for item in items])
    bounds = None if low is None or high is None else (low, high)
    return Figure(
        value,
        items[0].unit,
        len(items),
        interval=_single_interval(items[0], ok[0].resampled) if len(items) == 1 else bounds if len(items) > 2 else None,
        spread=bounds if len(items) == 2 else None,
        compiled=any(item.kind == "compiled" for item in items),
    )


def _single_interval(item: Measurement, resampled: Sequence[float]) -> tuple[float, float] | None:
    """The interval of one seed's score over the test items: its own, or the percentiles of the resampled scores."""
    if item.interval_low is not None and item.interval_high is not None:
        return item.interval_low, item.interval_high
    if len(resampled) < FEWEST_RESAMPLES:
        return None
    cut = round(0.025 * len(resampled))
    ordered = sorted(resampled)
    return ordered[cut], ordered[-1 - cut]


class Place(NamedTuple):
    """What results must share to stand in one section; ``machine`` is its fingerprint."""

    question: str
    profile: str
    target: str
    task: str
    machine: str
    data: tuple[tuple[str, str], ...]


def make_sections(results: Iterable[Result], questions: Mapping[str, QuestionInfo]) -> list[Section]:
    """Group results by question, profile, target, machine and data: only what may be compared shares a table.

    A run that failed before it knew its machine or data joins the first section that it fits. Of two results of one
    seed the later one stands.
    """
    results = list(results)
    groups = _grouped(results)
    empty = {place for place, members in groups.items() if all(result.status != "ok" for result in members)}
    places = sorted(groups, key=lambda place: (place.question, place in empty, *map(str, place[1:])))
    counts = Counter(place.question for place in places if place not in empty)
    by_question: dict[str, list[Place]] = {}
    for place in places:
        by_question.setdefault(place.question, []).append(place)
    names = machine_names(results)
    sections: dict[str, Section] = {}
    for place in places:
        question = place.question
        alone = counts[question] == (0 if place in empty else 1)
        slug = _slug(question if alone else f"{question}-{place.profile}-{place.target}", sections)
        info = questions.get(question) or QuestionInfo(question)
        title = _title(info, by_question[question], place, names[place.machine])
        sections[slug] = _section(slug, title, info, groups[place], names[place.machine])
    return list(sections.values())


def _grouped(results: Sequence[Result]) -> dict[Place, list[Result]]:
    """The results of each place, in their order."""
    places: dict[int, Place] = {}
    known: dict[Place, None] = {}
    # those that ended well come first, so that every place they make is known when the others look for theirs
    for number, result in sorted(enumerate(results), key=lambda pair: pair[1].status != "ok"):
        own = _place(result)
        fitting = (place for place in known if result.status != "ok" and _fits(own, place, result))
        places[number] = next(fitting, own)
        known[places[number]] = None
    groups: dict[Place, list[Result]] = {}
    for number, result in enumerate(results):
        groups.setdefault(places[number], []).append(result)
    return groups


def _place(result: Result) -> Place:
    spec = result.spec
    data = tuple(sorted(result.data.items()))
    return Place(spec.question, spec.profile, spec.target, spec.task.canonical(), fingerprint(result.machine), data)


def _fits(own: Place, known: Place, result: Result) -> bool:
    """Whether a place agrees with all that a result that did not end well knows of its own."""
    machine, data = not result.machine or own.machine == known.machine, not own.data or own.data == known.data
    return own[:4] == known[:4] and machine and data


def _title(info: QuestionInfo, places: Sequence[Place], place: Place, machine: str) -> str:
    """Title of one of a question's sections: with its case, and with what tells it from the question's others."""
    parts = [info.title, *place.question.split("/")[2:]] if info.title else [place.question]
    if len({(other.profile, other.target) for other in places}) > 1:
        parts += [place.profile, place.target]
    if len({other.machine for other in places}) > 1:
        parts.append(machine)
    alike = [other for other in places if other[1:3] == place[1:3] and other.machine == place.machine]
    if len(alike) > 1:
        parts.append(f"data or task {1 + alike.index(place)}")
    return " · ".join(parts)


def _slug(words: str, taken: Container[str]) -> str:
    """Make a file name and anchor of ``words`` that is not ``taken``."""
    base = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:80] or "question"
    slugs = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    return next(slug for slug in slugs if slug not in taken)


def _section(slug: str, title: str, info: QuestionInfo, results: Sequence[Result], machine: str) -> Section:
    """Order the variants as they came, the baseline first."""
    by_variant: dict[str, dict[int, Result]] = {}
    for result in results:
        by_variant.setdefault(result.spec.variant, {})[result.spec.seed] = result
    metric = find_metric(results)
    members = {name: list(seeds.values()) for name, seeds in by_variant.items()}
    rows = [make_row(name, members, metric) for name in members]
    rows.sort(key=lambda row: row.variant != info.baseline)
    return Section(slug, title, info, metric, tuple(rows), machine, _facts(results))


def find_metric(results: Iterable[Result]) -> str:
    """Name of the task's score, as the results say; empty where none does."""
    return next((result.metric for result in results if result.metric), "")


def machine_line(machine: Mapping[str, Any]) -> str:
    """Say in one line what a result ran on."""
    cores = machine.get("affinity") or machine.get("cores")
    parts = [show(machine[key]) for key in ("cpu", "gpu") if machine.get(key)]
    parts += [f"{show(cores)} core{'' if cores == 1 else 's'}"] if cores else []
    return " · ".join(parts) or "machine not recorded"


def fingerprint(machine: Mapping[str, Any]) -> str:
    """Text that is equal for the same machine with the same settings and libraries, and for no other."""
    return json.dumps(machine, sort_keys=True)


def machine_names(results: Iterable[Result]) -> dict[str, str]:
    """Name of each machine by its fingerprint; those of one model are told apart by the facts in which they differ."""
    machines = {fingerprint(result.machine): result.machine for result in results}
    alike: dict[str, list[str]] = {}
    for mark, machine in machines.items():
        alike.setdefault(machine_line(machine), []).append(mark)
    names = {}
    for line, marks in alike.items():
        facts = [flat(machines[mark]) for mark in marks]
        tails = [""] * len(marks)
        for key in dict.fromkeys(key for known in facts for key in known):
            values = [known.get(key, "–") for known in facts]
            if len(set(values)) > 1 and len(set(tails)) < len(marks):
                tails = [f"{tail} · {key} {value}" for tail, value in zip(tails, values, strict=True)]
        names.update({mark: line + tail for mark, tail in zip(marks, tails, strict=True)})
    return names


def _facts(results: Sequence[Result]) -> tuple[str, ...]:
    """What all rows of a section share: profile, task, target, engine, seeds, data; and whether the code changed."""
    spec = results[0].spec
    seeds = sorted({result.spec.seed for result in results})
    engines = sorted({f"{result.spec.engine.name} {result.spec.engine.precision or ''}".strip() for result in results})
    fields = ", ".join(f"{name} {show(value)}" for name, value in spec.task.fields.items())
    facts = [
        f"profile {spec.profile}",
        f"task {spec.task.name}" + (f" ({fields})" if fields else ""),
        f"target {spec.target}",
        "engine " + ", ".join(engines),
        "seeds " + ", ".join(map(str, seeds)) if len(seeds) > 1 else f"one seed ({seeds[0]})",
    ]
    data = next((result.data for result in results if result.data), {})
    shown = [f"{name} {value[:12]}" for name, value in data.items() if name != "synthetic"]
    facts += ["data " + ", ".join(shown)] if shown else []
    facts += [f"synthetic data: {data['synthetic']}"] if "synthetic" in data else []
    codes: dict[str, set[str]] = {}  # by variant, since variants may use different packages
    for result in results:
        codes.setdefault(result.spec.variant, set()).add(show(result.context.get("code")))
    return (*facts, *(["seeds measured with different code"] if max(map(len, codes.values())) > 1 else []))
