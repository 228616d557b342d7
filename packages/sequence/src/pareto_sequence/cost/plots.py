"""One picture per figure: ratios over lengths, and grids of length by width as in Figs. 7.5 to 7.7."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pareto_core import UnsupportedError
from pareto_sequence.cost.tables import TITLES, Costs
from pareto_sequence.cost.turns import DIRECTIONS, Row

#: what a line of a plot stands for, by table, besides its case
LINES = {"convolution": ("dilation",), "ema": ("state",), "tokens": ()}
#: cases of the models table that have a grid, by the word in its file's name
GRIDS = {"TCNCA (own kernel)": "tcnca", "MEGA-chunk (truncated kernel)": "mega-truncated"}
LABELS = {"convolution": "speed-up over torch", "ema": "speed-up over FFT", "tokens": "time per token, relative"}


def draw(costs: Costs, directory: Path) -> list[Path]:
    """Write a PNG per figure; raises :class:`UnsupportedError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("plots need matplotlib, which is not installed here") from error
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in costs.tables():
        rows = costs.of(table)
        groups = _grids(rows) if table == "models" else {table: rows}
        for name, group in groups.items():
            figure = Figure(figsize=(11, 4.5), layout="constrained")
            (_grid_figure if table == "models" else _line_figure)(figure, name, group)
            path = directory / f"{name.replace(' ', '_')}.png"
            figure.savefig(path, dpi=120)
            paths.append(path)
    return paths


def _line_figure(figure: Any, name: str, rows: Sequence[Row]) -> None:
    figure.suptitle(TITLES[name])
    for axes, direction in zip(figure.subplots(1, 2), DIRECTIONS, strict=True):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row.direction == direction and row.ratio is not None and row.case != row.base:
                label = ", ".join([row.case, *(f"{key} {row.place[key]}" for key in LINES[name])])
                lines.setdefault(label, []).append(row)
        for label, line in lines.items():
            values = [row.ratio.value for row in line if row.ratio]
            errors = [
                [row.ratio.value - row.ratio.low for row in line if row.ratio],
                [row.ratio.high - row.ratio.value for row in line if row.ratio],
            ]
            axes.errorbar([int(row.place["length"]) for row in line], values, errors, marker="o", ms=3, label=label)
        axes.axhline(1, color="grey", lw=0.8)  # the base
        axes.set(xlabel="length", ylabel=LABELS[name], title=direction.capitalize())
        lengths = sorted({int(row.place["length"]) for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        if lines:
            axes.legend(fontsize=7)


def _grids(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each mode and EMA state, of the cases in :data:`GRIDS`."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.case in GRIDS:
            name = f"{GRIDS[row.case]} {row.place['mode']} state {row.place['state']}"
            groups.setdefault(name, []).append(row)
    return groups


def _grid_figure(figure: Any, name: str, rows: Sequence[Row]) -> None:
    figure.suptitle(f"Speed-up over MEGA-chunk: {name}")
    lengths = sorted({int(row.place["length"]) for row in rows})
    widths = sorted({int(row.place["width"]) for row in rows})
    for axes, direction in zip(figure.subplots(1, 2), DIRECTIONS, strict=True):
        cells = {(r.place["width"], r.place["length"]): r for r in rows if r.direction == direction}
        values = [[_ratio(cells.get((width, length))) for length in lengths] for width in widths]
        axes.imshow(values, aspect="auto", cmap="RdYlGn", vmin=0.5, vmax=2.0, origin="lower")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                axes.text(j, i, _text(cells.get((widths[i], lengths[j])), value), ha="center", va="center")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(widths)), [str(width) for width in widths])
        axes.set(xlabel="length", ylabel="embedding dimension", title=direction.capitalize())


def _text(row: Row | None, value: float) -> str:
    if row is not None and row.problem:
        return "OOM"
    return "" if math.isnan(value) else f"{value:.2f}"


def _ratio(row: Row | None) -> float:
    return float("nan") if row is None or row.ratio is None else row.ratio.value
