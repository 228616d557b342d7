"""Turns results into something to read: a terminal table, Markdown, one HTML file, figures and CSV.

From top to bottom: results are grouped into sections (one question on one machine), the seeds of a variant become one
row, rows become tables of text, and the templates beside this module lay the tables out.

How seeds are combined, as the legend of every table says:

- the score: mean over seeds with a 95 % Student interval from three seeds on, the extremes with two, none with one;
- every other figure: the median over seeds, its spread the medians of the seeds' p10 and p90;
- a ratio to the baseline: geometric mean over seeds; its interval reaches from the lowest lower to the highest upper
  bound, and there is a verdict only where every seed gives the same one. That is conservative.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core import DataError, Result
from pareto_core.result import Comparison, Measurement
from pareto_runner import plots

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

#: two-sided 95 % quantiles of Student's distribution for 1 to 30 degrees of freedom
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
#: families of figures that have a column each, in the order of the columns: prefix, words, unit
COSTS = (
    ("latency_ms.", "Latency", "ms"),
    ("first_token_ms.", "First token", "ms"),
    ("next_token_ms.", "Next token", "ms"),
    ("throughput.", "Throughput", "items/s"),
    ("train_step_ms", "Training step", "ms"),
    ("train_peak_mib", "Training peak memory", "MiB"),
    ("inference_peak_mib", "Inference peak memory", "MiB"),
    ("weight_mib", "Weights", "MiB"),
)
#: figures that are not the task's score
CONTROL = "control."
#: points of a training curve at the most, and optimizer steps that each averages at the least
CURVE_POINTS, STEPS_PER_POINT = 80, 8
SIGNS = {"better": "▲", "worse": "▼", "inconclusive": "≈"}
LEGEND = (
    "Score: mean over seeds ± half of its 95 % Student interval (three seeds or more), or the extremes (two seeds).",
    "Other figures: median over seeds; in small print the medians of the seeds' p10 and p90.",
    "× is the ratio to the baseline, measured in turns with it: geometric mean over seeds. Its interval spans the 95 % "
    "bootstrap intervals of all seeds, and a verdict (▲ better, ▼ worse) stands only where all seeds give it; "
    "≈ is inconclusive.",
)


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


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table: the figure, its spread, its ratio to the baseline with verdict, and what to know of it."""

    text: str = "–"
    spread: str = ""
    ratio: str = ""
    verdict: str = ""
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Heads and rows of text; the first cell of a row is its name."""

    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


# ---- from results to rows


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


# ---- from rows to tables of text


def number(value: float, unit: str = "") -> str:
    """Write a figure with the digits that it carries: whole with separators from 100 on, else three digits."""
    if unit == "%":
        return f"{value:.1f}"
    if abs(value) >= 99.95 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.9995 else f"{value:.3g}"


def show(value: Any) -> str:
    """Write any JSON value in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    """Write the name of a metric or request for people: ``batch32`` as ``batch 32``."""
    text = re.sub(r"(?<=[a-z])(?=\d)", " ", name.replace("_", " "))
    return text[:1].upper() + text[1:]


def columns(section: Section) -> list[tuple[str, str]]:
    """Names of the measurements that have a column, and its head; a figure that is equal everywhere has none."""
    present = list(dict.fromkeys(name for row in section.rows for name in row.figures))
    found = []
    for prefix, title, unit in COSTS:
        for name in present:
            if name != prefix and not (prefix.endswith(".") and name.startswith(prefix)):
                continue
            values = [row.figures[name].value for row in section.rows if name in row.figures]
            if name == "weight_mib" and max(values) <= 1.01 * min(values):
                continue
            request = words(name.removeprefix(prefix)).lower() if name != prefix else ""
            found.append((name, f"{title}, {request} ({unit})" if request else f"{title} ({unit})"))
    return found


def results_table(section: Section) -> Table:
    """The table of a section: score, trainable parameters, and each cost with its ratio to the baseline."""
    costs = columns(section)
    unit = next((row.figures[section.metric].unit for row in section.rows if section.metric in row.figures), "")
    score_head = (words(section.metric) if section.metric else "Score") + (f" ({unit})" if unit else "")
    heads = ("Variant", score_head, "Trainable parameters", *(head for _, head in costs))
    rows: list[tuple[Cell, ...]] = []
    for row in section.rows:
        mark = "baseline" if row.variant == section.info.baseline else ""
        name = Cell(row.variant, spread=row.seeds, mark=mark)
        if not row.ok:
            rows.append((name, Cell(" · ".join(reason for _, reason in row.problems), mark=row.problems[0][0])))
            continue
        cells = [figure_cell(row, section.metric, is_score=True), _parameters_cell(row)]
        rows.append((name, *cells, *(figure_cell(row, cost) for cost, _ in costs)))
    return Table(heads, tuple(rows))


def figure_cell(row: Row, name: str, is_score: bool = False) -> Cell:
    """The figure ``name`` of a row with its spread, and its ratio where it was compared."""
    figure = row.figures.get(name)
    if figure is None:
        return Cell()
    text, spread = number(figure.value, figure.unit), ""
    if figure.low is not None and figure.high is not None:
        spread = f"{number(figure.low, figure.unit)}–{number(figure.high, figure.unit)}"
        if is_score and figure.seeds > 2:
            half = figure.high - figure.value
            text, spread = f"{text} ± {half:.1f}" if half >= 0.1 else f"{figure.value:.2f} ± {half:.2f}", ""
    ratio = row.ratios.get(name)
    return Cell(
        text,
        spread,
        f"×{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else "",
        ratio.verdict if ratio else "",
        "compiled" if figure.compiled else "",
    )


def _parameters_cell(row: Row) -> Cell:
    count, share = row.figures.get("trainable_parameters"), row.figures.get("trainable_percent")
    if count is None:
        return Cell()
    return Cell(f"{count.value:,.0f}", spread=f"{share.value:.3g} %" if share else "")


def reference_table(section: Section, reference: Reference) -> Table:
    """The paper's table, and beside each row that we ran, our figures."""
    by_variant = {row.variant: row for row in section.rows}
    shown = {name: by_variant.get(section.info.ours.get(name, "")) for name in reference.rows}
    ratio_names = sorted({name for row in shown.values() if row for name in row.ratios if not name.startswith(CONTROL)})
    heads = ["Method", *reference.columns, f"Ours: {words(section.metric).lower() or 'score'}", "Ours: trainable"]
    heads += [f"Ours: {_short(name)} ×" for name in ratio_names]
    rows = []
    for name, values in reference.rows.items():
        row = shown[name]
        cells = [Cell(name, spread=row.variant if row and row.variant != name else "")]
        cells += [Cell("–" if value is None else show(value)) for value in values]
        if row is None or not row.ok:
            cells += [Cell()] * (2 + len(ratio_names))
        else:
            share = row.figures.get("trainable_percent")
            cells += [figure_cell(row, section.metric, is_score=True)]
            cells += [Cell(f"{share.value:.3g} %") if share else Cell()]
            cells += [_ratio_cell(row, ratio, section.info.baseline) for ratio in ratio_names]
        rows.append(tuple(cells))
    return Table(tuple(heads), tuple(rows))


def _ratio_cell(row: Row, name: str, baseline: str | None) -> Cell:
    if row.variant == baseline:
        return Cell("1", spread="baseline")
    ratio = row.ratios.get(name)
    return Cell(f"{ratio.ratio:.3f}", f"{ratio.low:.3f}–{ratio.high:.3f}", "", ratio.verdict) if ratio else Cell()


def _short(name: str) -> str:
    """Name a figure in a few words."""
    head, _, request = name.partition(".")
    return f"{words(head.removesuffix('_ms')).lower()}{' ' + words(request).lower() if request else ''}"


def controls(section: Section) -> list[str]:
    """One line per A/A control: what this machine cannot tell from 1."""
    lines = []
    for row in section.rows:
        for name, ratio in row.ratios.items():
            if name.startswith(CONTROL):
                what = _short(name.removeprefix(CONTROL))
                seen = "no difference, as it should" if ratio.verdict == "inconclusive" else "a difference: distrust"
                interval = f"×{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
                lines.append(f"{what}: {row.variant} against itself {interval}, {seen}")
    return lines


def rivalries(section: Section) -> list[str]:
    """One line per comparison with a variant that is not the baseline."""
    signs = {"better": "lower", "worse": "higher", "inconclusive": "not told apart"}
    return [
        f"{_short(ratio.name)}: {row.variant} against {ratio.baseline} "
        f"×{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {signs[ratio.verdict]}"
        for row in section.rows
        for ratio in row.rivals
    ]


def environment_tables(results: Sequence[Result]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each machine, what is known of it and of the circumstances; values that differ are all listed."""
    tables: dict[str, dict[str, dict[str, None]]] = {}
    for result in results:
        facts = tables.setdefault(machine_line(result.machine), {})
        flat = {**_flat(result.machine), **_flat(result.context), **{f"data {k}": v for k, v in result.data.items()}}
        for key, value in flat.items():
            facts.setdefault(key, {})[value] = None
    return [(name, [(key, _several(list(values))) for key, values in facts.items()]) for name, facts in tables.items()]


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key} {inner}": show(item) for inner, item in value.items()})
        else:
            flat[str(key)] = show(value)
    return flat


def _several(values: Sequence[str]) -> str:
    if len(values) <= 3:
        return " · ".join(values)
    return f"{min(values)} … {max(values)} ({len(values)} values)"


# ---- figures


def pareto_panels(section: Section) -> list[plots.Panel]:
    """Score against latency, training memory and trainable parameters: those that were taken on two variants or more.

    Of several latencies the first is drawn; where nothing was trained, inference memory stands for training memory.
    """
    names = [name for name, _ in columns(section)]
    heads = dict(columns(section))
    speed = next((name for name in names if name.startswith(("latency_ms", "next_token_ms", "first_token_ms"))), None)
    memory = next((name for name in ("train_peak_mib", "inference_peak_mib") if name in names), None)
    wanted = [("latency", speed), ("memory", memory), ("parameters", "trainable_parameters")]
    panels = []
    for kind, name in wanted:
        points = _points(section, name) if name else ()
        if len(points) >= 2:
            label = heads.get(str(name), "Trainable parameters")
            panels.append(
                plots.Panel(
                    name=kind,
                    x_label=label,
                    y_label=results_table(section).heads[1],
                    points=points,
                    higher_is_better=all(result.higher_is_better for result in section.results),
                )
            )
    return panels


def _points(section: Section, name: str) -> tuple[plots.Point, ...]:
    points = []
    for series, row in enumerate(section.rows):
        cost, score = row.figures.get(name), row.figures.get(section.metric)
        if cost is None or score is None:
            continue
        points.append(
            plots.Point(
                label=row.variant,
                x=cost.value,
                y=score.value,
                series=series,
                x_range=_range(cost),
                y_range=_range(score),
                compiled=cost.compiled or score.compiled,
            )
        )
    return tuple(points)


def _range(figure: Figure) -> tuple[float, float] | None:
    return (figure.low, figure.high) if figure.low is not None and figure.high is not None else None


def curve_lines(section: Section) -> list[plots.Line]:
    """Training loss of each variant that trained: averaged over bins of steps, then over seeds."""
    lines = []
    for series, row in enumerate(section.rows):
        curves = [result.curve for result in row.ok if len(result.curve) >= 2]
        if not curves:
            continue
        last = max(curve[-1][0] for curve in curves)
        count = min(CURVE_POINTS, max(2, min(len(curve) for curve in curves) // STEPS_PER_POINT))
        bins: list[list[list[float]]] = [[[] for _ in curves] for _ in range(count)]
        for k, curve in enumerate(curves):
            for step, loss in curve:
                bins[min(count - 1, int(step / (last + 1) * count))][k].append(loss)
        kept = [(i, [statistics.fmean(seed) for seed in seeds if seed]) for i, seeds in enumerate(bins) if any(seeds)]
        lines.append(
            plots.Line(
                label=row.variant,
                series=series,
                steps=tuple((i + 0.5) * (last + 1) / count for i, _ in kept),
                mean=tuple(statistics.fmean(values) for _, values in kept),
                low=tuple(min(values) for _, values in kept),
                high=tuple(max(values) for _, values in kept),
            )
        )
    return lines


def front_names(section: Section) -> list[str]:
    """Variants on the front of the first panel."""
    panels = pareto_panels(section)
    if not panels:
        return []
    return [panels[0].points[i].label for i in plots.front(panels[0].points, panels[0].higher_is_better)]


# ---- files


def write_report(results: Sequence[Result], questions: Mapping[str, QuestionInfo], directory: Path) -> Path:
    """Write ``report.html``, ``report.md`` and each question's figures and CSV to ``directory``; return the HTML file.

    Raises :class:`DataError` where there are no results.
    """
    if not results:
        raise DataError("no results to report on: run `pareto bench` first, or name the journal that has them")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sections = make_sections(results, questions)
    pictures = {section.slug: _write_figures(section, directory) for section in sections}
    for section in sections:
        _write(directory / f"{section.slug}-pareto.csv", section_csv(section))
    values = _template_values(results, sections, pictures)
    _write(directory / "report.md", _render("report.md.j2", values))
    path = directory / "report.html"
    _write(path, _render("report.html.j2", values))
    return path


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _write_figures(section: Section, directory: Path) -> dict[str, list[str]]:
    """Write a section's figures; return the inline SVG of each by kind."""
    inline: dict[str, list[str]] = {"pareto": [], "curves": []}
    panels = pareto_panels(section)
    if panels:
        figure = plots.pareto_figure(panels)
        _write(directory / f"{section.slug}-pareto.svg", plots.svg(figure))
        plots.save_png(figure, directory / f"{section.slug}-pareto.png")
        for panel in panels:
            single = plots.pareto_figure([panel])
            inline["pareto"].append(plots.svg(single, f"{section.slug}-{panel.name}-", standalone=False))
    lines = curve_lines(section)
    if lines:
        figure = plots.curves_figure(lines)
        _write(directory / f"{section.slug}-curves.svg", plots.svg(figure))
        plots.save_png(figure, directory / f"{section.slug}-curves.png")
        _write(directory / f"{section.slug}-curves.csv", curves_csv(lines))
        inline["curves"].append(plots.svg(figure, f"{section.slug}-curves-", standalone=False))
    return inline


def section_csv(section: Section) -> str:
    """All figures of a section, one row per variant: value, spread, ratio and verdict of each, without rounding."""
    names = list(dict.fromkeys(name for row in section.rows for name in row.figures))
    compared = list(dict.fromkeys(name for row in section.rows for name in row.ratios))
    heads = ["question", "profile", "target", "machine", "variant", "status", "seeds", "seeds_ok", "front", "reason"]
    heads += [f"{name}{part}" for name in names for part in ("", ".low", ".high", ".kind")]
    heads += [f"ratio.{name}{part}" for name in compared for part in ("", ".low", ".high", ".baseline", ".verdict")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    best = front_names(section)
    for row in section.rows:
        spec = row.results[0].spec
        status = "ok" if row.ok else row.results[0].status
        line: list[Any] = [spec.question, spec.profile, spec.target, section.machine, row.variant, status]
        line += [len(row.results), len(row.ok), row.variant in best, " · ".join(reason for _, reason in row.problems)]
        for name in names:
            figure = row.figures.get(name)
            kind = "compiled" if figure and figure.compiled else "measured"
            line += [figure.value, figure.low, figure.high, kind] if figure else [None] * 4
        for name in compared:
            ratio = row.ratios.get(name)
            line += [ratio.ratio, ratio.low, ratio.high, ratio.baseline, ratio.verdict] if ratio else [None] * 5
        writer.writerow(line)
    return out.getvalue()


def curves_csv(lines: Sequence[plots.Line]) -> str:
    """The points of the training curves, as drawn."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["variant", "step", "loss", "low", "high"])
    for line in lines:
        writer.writerows((line.label, *row) for row in zip(line.steps, line.mean, line.low, line.high, strict=True))
    return out.getvalue()


def _template_values(
    results: Sequence[Result], sections: Sequence[Section], pictures: Mapping[str, Mapping[str, list[str]]]
) -> dict[str, Any]:
    """What both templates show, as text."""
    statuses = [result.status for result in results]
    blocks = []
    for section in sections:
        failures = [(row.variant, row.seeds, *problem) for row in section.rows for problem in row.problems]
        papers = {(p.get("title", ""), p.get("url", "")): p for p in (r.paper for r in section.results) if p}
        majority = [f.value for row in section.rows if (f := row.figures.get("majority_accuracy"))]
        blocks.append(
            {
                "section": section,
                "table": results_table(section),
                "compiled": any(figure.compiled for row in section.rows for figure in row.figures.values()),
                "majority": number(statistics.median(majority), "%") if majority else "",
                "references": [
                    (reference, reference_table(section, reference))
                    for reference in section.info.references
                    if any(row.ok for row in section.rows)
                ],
                "controls": controls(section),
                "rivals": rivalries(section),
                "failures": failures,
                "front": front_names(section),
                "papers": list(papers.values()),
                "pictures": pictures[section.slug],
            }
        )
    return {
        "counts": {status: statuses.count(status) for status in ("ok", "failed", "unsupported")},
        "total": len(results),
        "questions": len({section.info.name for section in sections}),
        "blocks": blocks,
        "environment": environment_tables(results),
        "legend": LEGEND,
        "signs": SIGNS,
        "times": sorted(str(r.context["time"])[:16].replace("T", " ") for r in results if r.context.get("time")),
        "commits": sorted({_commit(result) for result in results if result.context.get("commit")}),
    }


def _commit(result: Result) -> str:
    return str(result.context["commit"])[:10] + (" (with uncommitted changes)" if result.context.get("dirty") else "")


def _render(name: str, values: Mapping[str, Any]) -> str:
    """Fill a template; every value is escaped, for HTML or for a Markdown table."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    html = name.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=None if html else _markdown,
    )
    environment.filters["link"] = _link
    return environment.get_template(name).render(values)


def _markdown(value: Any) -> Any:
    """Make text safe inside Markdown, table cells included; what a template made is safe already."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_\[\]|#])", r"\\\1", text))


def _link(url: Any) -> str:
    """Return ``url`` where it is a web address, else nothing."""
    text = str(url)
    return text if re.match(r"https?://[^\s\"'<>()]+$", text) else ""


# ---- terminal


def terminal_table(results: Sequence[Result]) -> TerminalTable:
    """The short form for the end of a suite: score, parameters, first latency, training step and memory."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title="Results" if results else "No results",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Variant", overflow="fold", min_width=16)
    for head in ("Seeds", "Score", "Trained", "ms", "×", "Step ms", "×", "MiB"):
        table.add_column(head, justify="right", no_wrap=True)
    notes = Text()
    for section in make_sections(results, {}):
        for row in section.rows:
            texts = [row.variant, row.seeds.removesuffix("s").removesuffix(" seed"), *_terminal_cells(section, row)]
            table.add_row(*(Text(plots.clean(text, 60)) for text in texts))
            for status, reason in row.problems:
                notes.append(plots.clean(f"{row.variant} {status}: {reason}", 200) + "\n")
        notes.append(plots.clean(f"{section.title}: {section.machine}", 200) + "\n")
        table.add_section()
    table.caption, table.caption_justify = notes, "left"
    return table


def _terminal_cells(section: Section, row: Row) -> list[str]:
    """Texts of a row after its name and seeds."""
    if not row.ok:
        return [row.problems[0][0]]
    names = [name for name, _ in columns(section)]
    speed = next((name for name in names if name.startswith(("latency_ms", "next_token_ms"))), "")
    texts = [figure_cell(row, section.metric, is_score=True).text, _parameters_cell(row).text]
    for name in (speed, "train_step_ms"):
        cell = figure_cell(row, name)
        texts += [cell.text, f"{cell.ratio.split()[0]} {SIGNS[cell.verdict]}" if cell.ratio else ""]
    return [*texts, figure_cell(row, "train_peak_mib").text]
