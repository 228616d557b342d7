"""Groups results into sections, and the seeds of a variant into one row.

How seeds are combined, as the legend of every table says:

- the score: mean over seeds with a 95 % Student interval from three seeds on, the extremes with two, none with one;
- every other figure: the median over seeds, its spread the medians of the seeds' p10 and p90;
- a ratio to the baseline: geometric mean over seeds; its interval reaches from the lowest lower to the highest upper
  bound, and there is a verdict only where every seed gives the same one. That is conservative.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from pareto_core import Result
from pareto_core.result import Comparison, Measurement
from pareto_runner.wording import show

#: two-sided 95 % quantiles of Student's distribution for 1 to 30 degrees of freedom
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
#: begins the names of comparisons of the baseline with itself
CONTROL = "control."


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
    """One figure over the seeds of a variant."""

    value: float
    low: float | None
    high: float | None
    unit: str
    seeds: int
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """The seeds of one variant: ``ratios`` to the baseline by name, ``rivals`` to other variants."""

    variant: str
    results: tuple[Result, ...]
    figures: dict[str, Figure]
    ratios: dict[str, Comparison]
    rivals: tuple[Comparison, ...] = ()

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
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None, None
    if len(values) == 2:
        return mean, min(values), max(values)
    degrees = len(values) - 1
    quantile = STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96 + 2.4 / degrees
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
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
    )


def make_row(variant: str, results: Sequence[Result], metric: str) -> Row:
    """Combine the seeds of one variant; only those that ended well give figures."""
    ok = [result for result in results if result.status == "ok"]
    measured: dict[str, list[Measurement]] = {}
    compared: dict[tuple[str, str], list[Comparison]] = {}
    for result in ok:
        for item in result.measurements:
            measured.setdefault(item.name, []).append(item)
        for ratio in result.comparisons:
            compared.setdefault((ratio.name, ratio.baseline), []).append(ratio)
    figures = {name: _figure(items, name == metric) for name, items in measured.items()}
    baseline = next((result.spec.baseline for result in ok if result.spec.baseline != variant), None)
    combined = [combine_ratio(items) for items in compared.values()]
    ratios = {item.name: item for item in combined if item.baseline == baseline or item.name.startswith(CONTROL)}
    rivals = tuple(item for item in combined if item.name not in ratios or ratios[item.name] is not item)
    return Row(variant, tuple(results), figures, ratios, rivals)


def _figure(items: Sequence[Measurement], is_score: bool) -> Figure:
    """Combine one measurement over seeds."""
    compiled = any(item.kind == "compiled" for item in items)
    values = [item.value for item in items]
    if is_score:
        value, low, high = combine_score(values)
    else:
        lows = [item.low for item in items if item.low is not None]
        highs = [item.high for item in items if item.high is not None]
        value = statistics.median(values)
        low, high = (statistics.median(lows), statistics.median(highs)) if lows and highs else (None, None)
    return Figure(value, low, high, items[0].unit, len(items), compiled)


def make_sections(results: Iterable[Result], questions: Mapping[str, QuestionInfo]) -> list[Section]:
    """Group results by question, profile, target, machine and data: only what may be compared shares a table.

    A run that failed before it knew its machine or data joins the first section that it fits. Of two results of one
    seed the later one stands.
    """
    groups: dict[tuple[Any, ...], list[Result]] = {}
    # those that ended well come first, so that every section they make is known when the others look for theirs
    for result in sorted(results, key=lambda result: result.status != "ok"):
        spec = result.spec
        key = (spec.question, spec.profile, spec.target, spec.task.canonical())
        if result.status != "ok":
            found = [known for known in groups if known[:4] == key and _fits(result, known)]
            groups.setdefault(found[0] if found else (*key, *_surroundings(result)), []).append(result)
        else:
            groups.setdefault((*key, *_surroundings(result)), []).append(result)
    empty = {key for key, members in groups.items() if all(result.status != "ok" for result in members)}
    keys = sorted(groups, key=lambda key: (key[0], key in empty, *(str(part) for part in key[1:])))
    counts = Counter(key[0] for key in keys if key not in empty)
    sections: dict[str, Section] = {}
    for key in keys:
        question, profile, target = key[:3]
        alone = counts[question] == (0 if key in empty else 1)
        slug = _slug(question if alone else f"{question}-{profile}-{target}", sections)
        info = questions.get(question) or QuestionInfo(question)
        title = (info.title or question) + ("" if alone else f" · {profile} · {target}")
        sections[slug] = _section(slug, title, info, groups[key])
    return list(sections.values())


def _surroundings(result: Result) -> tuple[str, tuple[tuple[str, str], ...]]:
    return machine_line(result.machine), tuple(sorted(result.data.items()))


def _fits(result: Result, key: tuple[Any, ...]) -> bool:
    machine, data = _surroundings(result)
    return (not result.machine or machine == key[4]) and (not data or data == key[5])


def _slug(words: str, taken: Container[str]) -> str:
    """Make a file name and anchor of ``words`` that is not ``taken``."""
    base = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:80] or "question"
    slugs = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    return next(slug for slug in slugs if slug not in taken)


def _section(slug: str, title: str, info: QuestionInfo, results: Sequence[Result]) -> Section:
    """Order the variants as they came, the baseline first."""
    by_variant: dict[str, dict[int, Result]] = {}
    for result in results:
        by_variant.setdefault(result.spec.variant, {})[result.spec.seed] = result
    metric = find_metric(results)
    rows = [make_row(name, list(seeds.values()), metric) for name, seeds in by_variant.items()]
    rows.sort(key=lambda row: row.variant != info.baseline)
    with_machine = next((result for result in results if result.machine), results[0])
    return Section(slug, title, info, metric, tuple(rows), machine_line(with_machine.machine), _facts(results))


def find_metric(results: Iterable[Result]) -> str:
    """Name of the task's score, as the results say; empty where none does."""
    return next((result.metric for result in results if result.metric), "")


def machine_line(machine: Mapping[str, Any]) -> str:
    """Say in one line what a result ran on."""
    cores = machine.get("affinity") or machine.get("cores")
    parts = [show(machine[key]) for key in ("cpu", "gpu") if machine.get(key)]
    parts += [f"{cores} cores"] if cores else []
    return " · ".join(parts) or "machine not recorded"


def _facts(results: Sequence[Result]) -> tuple[str, ...]:
    """What all rows of a section share: profile, task, target, engine, seeds, and whether the data is synthetic."""
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
    synthetic = next((result.data["synthetic"] for result in results if "synthetic" in result.data), None)
    return (*facts, *([f"synthetic data: {synthetic}"] if synthetic is not None else []))
