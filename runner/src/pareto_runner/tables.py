"""Lays rows out as tables of text: results, the paper's figures beside ours, controls, rivals, environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pareto_core import Result
from pareto_runner.sections import CONTROL, Reference, Row, Section, machine_line
from pareto_runner.wording import number, show, words

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
        cells = [figure_cell(row, section.metric, is_score=True), parameters_cell(row)]
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
