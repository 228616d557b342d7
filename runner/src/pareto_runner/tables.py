"""Lays rows out as tables of text: results, the paper's figures beside ours, controls, rivals, environment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pareto_core import Result
from pareto_core.result import Comparison, Difference
from pareto_runner.sections import CONTROL, Figure, Reference, Row, Section, fingerprint, machine_names
from pareto_runner.wording import bounds, difference, flat, margin, number, ratio, show, words

#: families of figures that have a column each, in the order of the columns: prefix, words, unit
COSTS = (
    ("latency_ms.", "Latency", "ms"),
    ("first_token_ms.", "First token", "ms"),
    ("next_token_ms.", "Next token", "ms"),
    ("train_step_ms", "Training step", "ms"),
    ("train_peak_mib", "Training peak memory", "MiB"),
    ("inference_peak_mib", "Inference peak memory", "MiB"),
    ("weight_mib", "Weights", "MiB"),
)
SIGNS = {"better": "▲", "worse": "▼", "inconclusive": "≈"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table: the figure, its interval and spread, its change from the baseline, and what to know of it."""

    text: str = "–"
    interval: str = ""
    spread: str = ""
    change: str = ""
    verdict: str = ""
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Heads, a note under each, and rows of text; the first cell of a row is its name."""

    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Failure:
    """Seeds of a variant that did not end well in the same way; ``log`` is the tail of the first one's log."""

    variant: str
    seeds: str
    status: str
    reason: str
    log: str


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
    heads = ("Variant", score_head(section), "Trainable parameters", *(head for _, head in costs))
    rows: list[tuple[Cell, ...]] = []
    for row in section.rows:
        mark = "baseline" if row.variant == section.info.baseline else ""
        name = Cell(row.variant, spread=row.seeds, mark=mark)
        if not row.ok:
            rows.append((name, Cell(" · ".join(reason for _, reason in row.problems), mark=row.problems[0][0])))
            continue
        cells = [score_cell(row), parameters_cell(row)]
        rows.append((name, *cells, *(figure_cell(row, cost) for cost, _ in costs)))
    return Table(heads, tuple(rows), ("", "", "", *(_margin_note(section, cost) for cost, _ in costs)))


def score_head(section: Section) -> str:
    """Name and unit of the score."""
    unit = next((row.figures[section.metric].unit for row in section.rows if section.metric in row.figures), "")
    return (words(section.metric) if section.metric else "Score") + (f" ({unit})" if unit else "")


def _margin_note(section: Section, name: str) -> str:
    """What a ratio of this figure must differ from 1 by before there is a verdict."""
    margins = [row.ratios[name].margin for row in section.rows if name in row.ratios]
    return f"told apart beyond {margin(max(margins))}" if any(margins) else ""


def score_cell(row: Row) -> Cell:
    """The score of a row with its interval, and its difference to the baseline's."""
    figure = row.score
    if figure is None:
        return Cell()
    text, interval = number(figure.value, figure.unit), figure.interval
    if interval is not None and figure.seeds > 1:
        half = interval[1] - figure.value
        text = f"{text} ± {half:.1f}" if half >= 0.1 else f"{figure.value:.2f} ± {half:.2f}"
        interval = None
    found = row.difference
    return Cell(
        text,
        interval=bounds(*interval, figure.unit) if interval else "",
        spread=_range(figure.spread, figure) if figure.spread else "",
        change=difference_text(found, figure.unit) if found else "",
        verdict=found.verdict if found else "",
        mark="compiled" if figure.compiled else "",
    )


def difference_text(found: Difference, unit: str) -> str:
    """A difference of scores with its interval, and McNemar's p-value where there is one."""
    test = f", p = {found.p_value:.2g}" if found.p_value is not None else ""
    return difference(found.difference, found.low, found.high, unit) + test


def figure_cell(row: Row, name: str) -> Cell:
    """The figure ``name`` of a row with interval and spread, and its ratio where it was compared."""
    figure = row.figures.get(name)
    if figure is None:
        return Cell()
    found = row.ratios.get(name)
    return Cell(
        number(figure.value, figure.unit),
        interval=bounds(*figure.interval, figure.unit) if figure.interval else "",
        spread=f"p10–p90 {_range(figure.spread, figure)}" if figure.spread else "",
        change=ratio(found.ratio, found.low, found.high) if found else "",
        verdict=found.verdict if found else "",
        mark="compiled" if figure.compiled else "",
    )


def _range(ends: tuple[float, float], figure: Figure) -> str:
    return "–".join(number(end, figure.unit) for end in ends)


def parameters_cell(row: Row) -> Cell:
    """Trainable parameters, and their share."""
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
            cells += [dataclasses.replace(score_cell(row), change="", verdict="")]
            cells += [Cell(f"{share.value:.3g} %") if share else Cell()]
            cells += [_ratio_cell(row, compared, section.info.baseline) for compared in ratio_names]
        rows.append(tuple(cells))
    return Table(tuple(heads), tuple(rows))


def _ratio_cell(row: Row, name: str, baseline: str | None) -> Cell:
    if row.variant == baseline:
        return Cell("1", spread="baseline")
    found = row.ratios.get(name)
    if found is None:
        return Cell()
    return Cell(f"{found.ratio:.3f}", interval=f"[{found.low:.3f}, {found.high:.3f}]", verdict=found.verdict)


def _short(name: str) -> str:
    """Name a figure in a few words."""
    head, _, request = name.partition(".")
    return f"{words(head.removesuffix('_ms')).lower()}{' ' + words(request).lower() if request else ''}"


def controls(section: Section) -> list[str]:
    """One line per A/A control: what this machine cannot tell from 1."""
    lines = []
    for row in section.rows:
        for name, found in row.ratios.items():
            if name.startswith(CONTROL):
                what = _short(name.removeprefix(CONTROL))
                seen = "no difference, as it should" if found.verdict == "inconclusive" else "a difference: distrust"
                interval = ratio(found.ratio, found.low, found.high)
                lines.append(f"{what}: {row.variant} against itself {interval}, {seen}")
    return lines


def rivalries(section: Section) -> list[str]:
    """One line per comparison with a variant that is not the baseline."""
    return [_rivalry(row, rival) for row in section.rows for rival in row.rivals]


def _rivalry(row: Row, found: Comparison | Difference) -> str:
    sides = f"{row.variant} against {found.baseline}"
    if isinstance(found, Difference):
        unit = row.score.unit if row.score else ""
        return f"{_short(found.name)}: {sides} {difference_text(found, unit)}, {found.verdict}"
    signs = {"better": "lower", "worse": "higher", "inconclusive": "not told apart"}
    told = f" beyond {margin(found.margin)}" if found.margin else ""
    return f"{_short(found.name)}: {sides} {ratio(found.ratio, found.low, found.high)}, {signs[found.verdict]}{told}"


def failures(section: Section) -> list[Failure]:
    """What did not end well, equal ends of a variant's seeds together."""
    alike: dict[tuple[str, str, str], list[Result]] = {}
    for result in section.results:
        if result.status != "ok":
            alike.setdefault((result.spec.variant, result.status, result.reason), []).append(result)
    return [
        Failure(
            variant,
            ("seed " if len(results) == 1 else "seeds ") + ", ".join(str(result.spec.seed) for result in results),
            status,
            reason,
            next((result.log for result in results if result.log), ""),
        )
        for (variant, status, reason), results in alike.items()
    ]


def best_score(section: Section) -> str:
    """The variant with the best score, and that score; empty where there is none."""
    scored = [(row.score.value, row) for row in section.rows if row.score]
    if not scored:
        return ""
    highest = all(result.higher_is_better for result in section.results if result.metric)
    _, row = (max if highest else min)(scored, key=lambda pair: pair[0])
    return f"{row.variant}: {score_cell(row).text} {row.score.unit if row.score else ''}".rstrip()


def environment_tables(results: Sequence[Result]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each machine, what is known of it and of the circumstances; values that differ are all listed."""
    names = machine_names(results)
    tables: dict[str, dict[str, dict[str, None]]] = {}
    for result in results:
        facts = tables.setdefault(names[fingerprint(result.machine)], {})
        known = {**flat(result.machine), **flat(result.context), **{f"data {k}": v for k, v in result.data.items()}}
        for key, value in known.items():
            facts.setdefault(key, {})[value] = None
    return [(name, [(key, _several(list(values))) for key, values in facts.items()]) for name, facts in tables.items()]


def _several(values: Sequence[str]) -> str:
    if len(values) <= 3:
        return " · ".join(values)
    ordered = sorted(values, key=_magnitude)
    return f"{ordered[0]} … {ordered[-1]} ({len(values)} values)"


def _magnitude(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
