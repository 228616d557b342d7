"""Figures of a report: Pareto fronts and training curves, legible in light and dark, small and large, without colour.

Nothing here knows of results: a figure is drawn from points and lines. SVG text stays text; its ink is
``currentColor``, so that a page or the reader's colour scheme decides it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours (2008), told apart by the colour-blind too, without the yellow that white swallows and with
#: a blue that shows on black
COLOURS = ("#2B83C6", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
#: stands for the ink while matplotlib draws; replaced by ``currentColor`` in the SVG
INK = "#010203"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pareto",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.7,
}
PANEL_INCHES = (4.1, 3.3)
LABEL_LENGTH = 28
#: distances of a label from its point, in typographic points, tried from near to far
RADII = (7.0, 14.0, 24.0, 36.0)
DIRECTIONS = tuple(
    (math.cos(math.pi * k / 6), math.sin(math.pi * k / 6)) for k in (0, 6, 3, 9, 1, 5, 11, 7, 2, 4, 10, 8)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One variant in one panel; ``low`` and ``high`` are the ends of its error bars where it has them.

    ``series`` picks colour and marker. A ``compiled`` point is drawn, but takes no part in the front of measured ones.
    """

    label: str
    x: float
    y: float
    series: int = 0
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    compiled: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """A scatter of the score (y) against a cost (x, lower is better)."""

    name: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A training curve: mean over seeds, and the seeds' extremes."""

    label: str
    series: int
    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def front(points: Sequence[Point], higher_is_better: bool = True) -> list[int]:
    """Indices of the points that no other one beats in cost and score at once, by rising cost.

    A point is dominated where another is at least as good in both, and better in one.
    """
    sign = -1.0 if higher_is_better else 1.0
    measured = [i for i, point in enumerate(points) if not point.compiled]
    kept: list[int] = []
    best = math.inf
    for i in sorted(measured, key=lambda i: (points[i].x, sign * points[i].y)):
        value = sign * points[i].y
        equal = bool(kept) and points[kept[-1]].x == points[i].x and value == best
        if value < best or equal:
            kept.append(i)
            best = value
    return kept


def pareto_figure(panels: Sequence[Panel]) -> Figure:
    """Draw one scatter per panel, side by side."""
    figure, axes = _figure(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
    return figure


def curves_figure(lines: Sequence[Line]) -> Figure:
    """Draw training loss by optimizer step, each line named at its end; there must be a line."""
    figure, (axis,) = _figure(1)
    axis.set(xlabel="Optimizer step", ylabel="Training loss")
    for line in lines:
        colour = COLOURS[line.series % len(COLOURS)]
        axis.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(line.steps, line.mean, color=colour, linewidth=1.6)
    _name_lines(axis, lines)
    return figure


def svg(figure: Figure, prefix: str = "", standalone: bool = True) -> str:
    """Return ``figure`` as SVG text with a transparent ground.

    ``prefix`` keeps identifiers apart where several figures share a page. A ``standalone`` one carries the rule that
    makes its ink light on dark screens; otherwise the page around it decides.
    """
    import io

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": "Pareto"})
    text = buffer.getvalue().replace(INK, "currentColor")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    if standalone:
        rule = "svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}"
        return '<?xml version="1.0" encoding="utf-8"?>\n' + text.replace("<defs>", f"<style>{rule}</style><defs>", 1)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def save_png(figure: Figure, path: Any) -> None:
    """Write ``figure`` on white, 160 dots per inch."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": "Pareto"})


def clean(label: str, length: int = LABEL_LENGTH) -> str:
    """Make ``label`` one line of printable characters, at most ``length`` of them."""
    text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _figure(count: int) -> tuple[Figure, list[Axes]]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        width, height = PANEL_INCHES
        figure = Figure(figsize=(width * count, height))
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        for i, axis in enumerate(axes):
            axis.set_position(((i + 0.15) / count, 0.16, 0.81 / count, 0.80))
            axis.grid(True)
            axis.set_axisbelow(True)
    return figure, axes


def _draw_panel(axis: Axes, panel: Panel) -> None:
    """Draw the points, the staircase through the front, and the names."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
        _scale(axis, panel.points)
        best = front(panel.points, panel.higher_is_better)
        _draw_staircase(axis, [panel.points[i] for i in best], panel.higher_is_better)
        for i, point in enumerate(panel.points):
            _draw_point(axis, point, on_front=i in best)
        corner, word = ((0.015, 0.985), "↖ better") if panel.higher_is_better else ((0.015, 0.015), "↙ better")
        side = "top" if panel.higher_is_better else "bottom"
        note = axis.text(*corner, word, transform=axis.transAxes, va=side, ha="left", fontsize=8, alpha=0.6)
        _name_points(axis, panel.points, set(best), [note])


def _scale(axis: Axes, points: Sequence[Point]) -> None:
    """Set scale and limits; a narrow spread of costs is shown as narrow, not blown up to the panel's width."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    xs = [value for point in points for value in (point.x, *(point.x_range or ()))]
    ys = [value for point in points for value in (point.y, *(point.y_range or ()))]
    low, high = min(xs), max(xs)
    if low > 0 and high / low > 8:
        axis.set_xscale("log")
        grow = (high / low) ** 0.12
        axis.set_xlim(low / grow, high * grow)
        axis.xaxis.set_major_locator(LogLocator(numticks=6))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * abs(low + high) / 2, 1e-9)
        axis.set_xlim(middle - 1.3 * half, middle + 1.3 * half)
        axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(EngFormatter(sep="") if high >= 1e4 else _plain_number)
    middle, half = (min(ys) + max(ys)) / 2, max((max(ys) - min(ys)) / 2, 0.01 * abs(max(ys)), 1e-9)
    axis.set_ylim(middle - 1.3 * half, middle + 1.3 * half)
    axis.locator_params(axis="y", nbins=6)


def _plain_number(value: float, _: float) -> str:
    return f"{value:g}"


def _draw_staircase(axis: Axes, best: Sequence[Point], higher_is_better: bool) -> None:
    """Draw the edge of what is reachable: at each cost, the best score that a variant on the front has."""
    if not best:
        return
    bottom, top = axis.get_ylim()
    xs = [best[0].x, *(point.x for point in best), axis.get_xlim()[1]]
    ys = [bottom if higher_is_better else top, *(point.y for point in best), best[-1].y]
    axis.plot(xs, ys, drawstyle="steps-post", color=INK, alpha=0.45, linewidth=1.1, zorder=1.5, label="front")


def _draw_point(axis: Axes, point: Point, on_front: bool) -> None:
    colour = COLOURS[point.series % len(COLOURS)]
    bars: dict[str, Any] = {}
    if point.x_range is not None:
        bars["xerr"] = [[max(0.0, point.x - point.x_range[0])], [max(0.0, point.x_range[1] - point.x)]]
    if point.y_range is not None:
        bars["yerr"] = [[max(0.0, point.y - point.y_range[0])], [max(0.0, point.y_range[1] - point.y)]]
    if bars:
        axis.errorbar(point.x, point.y, **bars, fmt="none", ecolor=colour, elinewidth=1.1, alpha=0.55, zorder=2)
    axis.plot(
        point.x,
        point.y,
        marker=MARKERS[point.series % len(MARKERS)],
        markersize=7,
        color=colour,
        markerfacecolor=colour if on_front else "none",
        markeredgewidth=1.5,
        alpha=1.0 if on_front else 0.6,
        linestyle="none",
        zorder=3,
    )


def _name_points(axis: Axes, points: Sequence[Point], best: set[int], taken: Sequence[Any]) -> None:
    """Write each point's name beside it, in the free place nearest to it, and join the two where that is far."""
    from matplotlib.transforms import Bbox

    figure = axis.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    dot = figure.dpi / 72
    centres = [axis.transData.transform((point.x, point.y)) for point in points]
    obstacles = [Bbox.from_bounds(x - 5 * dot, y - 5 * dot, 10 * dot, 10 * dot) for x, y in centres]
    obstacles += [box for point in points for box in _bars(axis, point, dot)]
    obstacles += [box for line in axis.lines if line.get_label() == "front" for box in _stairs(axis, line, dot)]
    placed = [artist.get_window_extent(renderer) for artist in taken]
    inside = Bbox.from_extents(axis.bbox.x0, axis.bbox.y0, axis.bbox.x1 + 8 * dot, axis.bbox.y1 + 6 * dot)
    for i in sorted(range(len(points)), key=lambda i: (i not in best, -centres[i][1])):
        name = clean(points[i].label) + (" (compiled)" if points[i].compiled else "")
        text = axis.text(0, 0, name, fontsize=9, parse_math=False, alpha=1.0 if i in best else 0.7, zorder=4)
        text.set_transform(None)
        size = text.get_window_extent(renderer)
        box, radius = _free_place(centres[i], size.width, size.height, obstacles, placed, inside, dot)
        placed.append(box)
        text.set_transform(axis.transAxes)
        text.set_position(tuple(axis.transAxes.inverted().transform((box.x0, (box.y0 + box.y1) / 2))))
        text.set_verticalalignment("center")
        if radius > RADII[1]:
            near = (min(max(centres[i][0], box.x0), box.x1), min(max(centres[i][1], box.y0), box.y1))
            ends = axis.transAxes.inverted().transform([centres[i], near])
            axis.plot(*ends.T, transform=axis.transAxes, color=INK, alpha=0.35, linewidth=0.6, zorder=1.8)


def _bars(axis: Axes, point: Point, dot: float) -> list[Any]:
    from matplotlib.transforms import Bbox

    boxes = []
    for ends in (
        [(x, point.y) for x in point.x_range] if point.x_range else [],
        [(point.x, y) for y in point.y_range] if point.y_range else [],
    ):
        if ends:
            (x0, y0), (x1, y1) = axis.transData.transform(ends)
            boxes.append(Bbox.from_extents(x0 - dot, y0 - dot, x1 + dot, y1 + dot))
    return boxes


def _stairs(axis: Axes, line: Any, dot: float) -> list[Any]:
    """Boxes around the horizontal and vertical parts of the staircase."""
    from matplotlib.transforms import Bbox

    corners = axis.transData.transform(list(zip(*line.get_data(), strict=True)))
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        boxes.append(Bbox.from_extents(x0, y0 - dot, x1, y0 + dot))
        boxes.append(Bbox.from_extents(x1 - dot, min(y0, y1), x1 + dot, max(y0, y1)))
    return boxes


def _free_place(
    centre: Any, width: float, height: float, obstacles: Sequence[Any], placed: Sequence[Any], inside: Any, dot: float
) -> tuple[Any, float]:
    """Return the cheapest box for a label of ``width`` and ``height`` pixels, and its distance in points."""
    from matplotlib.transforms import Bbox

    def cost(box: Any, radius: float) -> float:
        clash = 6 * sum(_overlap(box, other) for other in placed) + 2 * sum(_overlap(box, other) for other in obstacles)
        outside = box.width * box.height - _overlap(box, inside)
        return (clash + 8 * outside) / (width * height) + radius / 80

    options: list[tuple[float, int, Any, float]] = []
    for radius in RADII:
        for dx, dy in DIRECTIONS:
            x = centre[0] + radius * dot * dx + (0 if dx > 0.01 else -width if dx < -0.01 else -width / 2)
            y = centre[1] + radius * dot * dy - height / 2 + (height / 2 * dy)
            box = Bbox.from_bounds(x, y, width, height)
            options.append((cost(box, radius), len(options), box, radius))
    _, _, box, radius = min(options)
    return box, radius


def _overlap(a: Any, b: Any) -> float:
    wide = float(min(a.x1, b.x1) - max(a.x0, b.x0))
    tall = float(min(a.y1, b.y1) - max(a.y0, b.y0))
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _name_lines(axis: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name to the right of its end; names that would touch are pushed apart."""
    figure = axis.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    end = max(line.steps[-1] for line in lines)
    start = min(line.steps[0] for line in lines)
    axis.set_xlim(start, end)
    axis.locator_params(nbins=6)
    bounds = axis.get_position()
    style = {"color": INK, "fontsize": 9, "va": "center", "parse_math": False}
    texts = [axis.text(0, 0, clean(line.label, 20), **style) for line in lines]
    width = max(text.get_window_extent(renderer).width for text in texts) / figure.bbox.width
    axis.set_position((bounds.x0, bounds.y0, bounds.width - width - 0.01, bounds.height))
    height = 1.15 * texts[0].get_window_extent(renderer).height / axis.get_window_extent(renderer).height
    wanted = [axis.transAxes.inverted().transform(axis.transData.transform((end, line.mean[-1])))[1] for line in lines]
    for i, y in zip(range(len(lines)), spread(wanted, height), strict=True):
        texts[i].set_transform(axis.transAxes)
        texts[i].set_position((1.025, y))
        colour = COLOURS[lines[i].series % len(COLOURS)]
        axis.plot((1.0, 1.02), (wanted[i], y), transform=axis.transAxes, clip_on=False, linewidth=1.2, color=colour)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move positions apart until neighbours are ``gap`` from each other, as little as that takes, in their order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, int]] = []
    for i in order:
        centre, count = wanted[i], 1
        while groups and centre - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
            other, size = groups.pop()
            centre, count = (centre * count + other * size) / (count + size), count + size
        groups.append((centre, count))
    places = [centre + gap * (k - (count - 1) / 2) for centre, count in groups for k in range(count)]
    result = [0.0] * len(wanted)
    for i, place in zip(order, places, strict=True):
        result[i] = place
    return result
