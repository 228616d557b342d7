"""Figures of a report: Pareto fronts and training curves, legible in light and dark, small and large, without colour.

Nothing here knows of results: a figure is drawn from points and lines.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from pareto_runner.drawing import Anchor, Area, Dot, Line, Picture, Words, text_width

#: Okabe and Ito's colours (2008), told apart by the colour-blind too, without the yellow that white swallows and with
#: a blue that shows on black
COLOURS = ("#2B83C6", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
PANEL_SIZE = (380.0, 310.0)
CURVES_SIZE = (460.0, 310.0)
#: pixels around what is plotted: left (beside the numbers of the axis), right, above, below
LEFT, RIGHT, ABOVE, BELOW = 34.0, 14.0, 12.0, 46.0
SMALL, NORMAL = 11.0, 12.0
LABEL_LENGTH = 28
#: half the size of a marker
MARKER = 4.5
#: costs that differ by more than this factor get a logarithmic axis
LOGARITHMIC_FROM = 8.0
#: distances of a label from its point, tried from near to far
RADII = (9.0, 18.0, 31.0, 47.0)
DIRECTIONS = tuple(
    (math.cos(math.pi * k / 6), math.sin(math.pi * k / 6)) for k in (0, 6, 3, 9, 1, 5, 11, 7, 2, 4, 10, 8)
)

#: left, top, right, bottom
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One variant in one panel; the ranges are the ends of its error bars where it has them.

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
class Curve:
    """A training curve: mean over seeds, and the seeds' extremes."""

    label: str
    series: int
    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps values from ``low`` to ``high`` to pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Pixel of ``value``, at most one length of the axis outside of it."""
        if self.logarithmic:
            part = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + min(2.0, max(-1.0, part)) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values inside of the scale, and how they are written."""
        values = log_ticks(self.low, self.high) if self.logarithmic else linear_ticks(self.low, self.high)
        return [(value, tick_text(value, self.high)) for value in values]


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


def pareto_picture(panel: Panel) -> Picture:
    """Draw a panel: points, their error bars and names, and the staircase through the front."""
    xs = [value for point in panel.points for value in (point.x, *(point.x_range or ()))]
    ys = [value for point in panel.points for value in (point.y, *(point.y_range or ()))]
    picture, x, y = _axes(PANEL_SIZE, _cost_limits(xs), _score_limits(ys), panel.x_label, panel.y_label)
    best = front(panel.points, panel.higher_is_better)
    stairs = _stairs([panel.points[i] for i in best], x, y, panel.higher_is_better)
    if stairs:
        picture.items.append(Line(dots=stairs, width=1.4, opacity=0.45))
    for i, point in enumerate(panel.points):
        picture.items += _bars(point, x, y)
        picture.items += _marker(point, x, y, on_front=i in best)
    hint = Words(x=x.start + 5, y=y.end + 7, text="↖ better", size=SMALL, opacity=0.6)
    if not panel.higher_is_better:
        hint = dataclasses.replace(hint, y=y.start - 9, text="↙ better")
    picture.items.append(hint)
    picture.items += _names(panel.points, set(best), stairs, hint, x, y)
    return picture


def curves_picture(curves: Sequence[Curve]) -> Picture:
    """Draw training loss by optimizer step, each curve named at its end; there must be a curve."""
    labels = [clean(curve.label, 20) for curve in curves]
    room = max(text_width(label, NORMAL) for label in labels) + 14
    steps = (min(curve.steps[0] for curve in curves), max(curve.steps[-1] for curve in curves))
    losses = _score_limits([value for curve in curves for value in (*curve.low, *curve.high)])
    picture, x, y = _axes(CURVES_SIZE, (*steps, False), losses, "Optimizer step", "Training loss", room)
    for curve in curves:
        colour = COLOURS[curve.series % len(COLOURS)]
        places = [x.at(step) for step in curve.steps]
        upper = [(place, y.at(value)) for place, value in zip(places, curve.high, strict=True)]
        lower = [(place, y.at(value)) for place, value in zip(places, curve.low, strict=True)]
        if curve.low != curve.high:
            picture.items.append(Area(dots=(*upper, *reversed(lower)), colour=colour, opacity=0.15))
        mean = tuple((place, y.at(value)) for place, value in zip(places, curve.mean, strict=True))
        picture.items.append(Line(dots=mean, colour=colour, width=2))
    ends = [y.at(curve.mean[-1]) for curve in curves]
    for curve, label, end, place in zip(curves, labels, ends, spread(ends, 1.25 * NORMAL), strict=True):
        colour = COLOURS[curve.series % len(COLOURS)]
        picture.items.append(Line(dots=((x.at(curve.steps[-1]), end), (x.end + 9, place)), colour=colour, width=1.4))
        picture.items.append(Words(x=x.end + 12, y=place, text=label))
    return picture


def clean(label: str, length: int = LABEL_LENGTH) -> str:
    """Make ``label`` one line of printable characters, at most ``length`` of them."""
    text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most ``most`` multiples of 1, 2 or 5 times a power of ten between ``low`` and ``high``."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (factor * power for factor in (1, 2, 5, 10, 20))
    step = next(step for step in steps if math.floor(high / step) - math.ceil(low / step) < most)
    return [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten between ``low`` and ``high``, at most ``most``; where they are few, also 2 and 5 times them."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    stride = max(1, -(-(last - first + 1) // most))
    factors = (1, 2, 5) if last - first < 2 else (1,)
    values = [factor * 10.0**power for power in range(first - 1, last + 1, stride) for factor in factors]
    return [value for value in values if low <= value <= high]


def tick_text(value: float, largest: float) -> str:
    """Write a value of an axis that reaches up to ``largest``: with k, M, G from ten thousand on."""
    if 1e4 <= largest < 1e15 and abs(value) >= 1000:
        power = min(4, int(math.log10(abs(value)) / 3 + 1e-9))
        return f"{value / 1000**power:.6g}{' kMGT'[power]}"
    return f"{value:.6g}" if abs(value) > 1e-12 * abs(largest) else "0"


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


def _cost_limits(values: Sequence[float]) -> tuple[float, float, bool]:
    """Limits of a cost's axis, and whether it is logarithmic; a narrow spread is shown as narrow, not blown up."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOGARITHMIC_FROM:
        grow = (high / low) ** 0.12
        return low / grow, high * grow, True
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * abs(low + high) / 2, 1e-9)
    return middle - 1.3 * half, middle + 1.3 * half, False


def _score_limits(values: Sequence[float]) -> tuple[float, float]:
    middle = (min(values) + max(values)) / 2
    half = max((max(values) - min(values)) / 2, 0.01 * max(map(abs, values)), 1e-9)
    return middle - 1.3 * half, middle + 1.3 * half


def _axes(
    size: Dot,
    x_limits: tuple[float, float, bool],
    y_limits: tuple[float, float],
    x_label: str,
    y_label: str,
    room: float = 0.0,
) -> tuple[Picture, Scale, Scale]:
    """Draw grid, axes, numbers and titles; ``room`` is kept free at the right. Returns the picture and its scales."""
    picture = Picture(*size)
    y = Scale(*y_limits, start=size[1] - BELOW, end=ABOVE)
    left = LEFT + max((text_width(text, SMALL) for _, text in y.ticks()), default=0.0)
    x = Scale(x_limits[0], x_limits[1], left, size[0] - RIGHT - room, x_limits[2])
    for place, text in [(x.at(value), text) for value, text in _apart(x.ticks(), x.at)]:
        picture.items.append(Line(dots=((place, y.start), (place, y.end)), opacity=0.12))
        picture.items.append(Words(x=place, y=y.start + 12, text=text, size=SMALL, anchor="middle"))
    for place, text in [(y.at(value), text) for value, text in y.ticks()]:
        picture.items.append(Line(dots=((x.start, place), (x.end, place)), opacity=0.12))
        picture.items.append(Words(x=x.start - 6, y=place, text=text, size=SMALL, anchor="end"))
    picture.items.append(Line(dots=((x.start, y.end), (x.start, y.start), (x.end, y.start)), opacity=0.8))
    middle = (y.start + y.end) / 2
    picture.items.append(Words(x=(x.start + x.end) / 2, y=size[1] - 13, text=clean(x_label, 50), anchor="middle"))
    picture.items.append(Words(x=11, y=middle, text=clean(y_label, 40), anchor="middle", upwards=True))
    return picture, x, y


def _apart(ticks: Sequence[tuple[float, str]], at: Callable[[float], float]) -> Iterator[tuple[float, str]]:
    """Leave out ticks whose words would touch those before them."""
    reached = -math.inf
    for value, text in ticks:
        half = text_width(text, SMALL) / 2
        if at(value) - half > reached + 4:
            reached = at(value) + half
            yield value, text


def _stairs(best: Sequence[Point], x: Scale, y: Scale, higher_is_better: bool) -> tuple[Dot, ...]:
    """The edge of what is reachable: at each cost, the best score that a variant on the front has."""
    if not best:
        return ()
    level = y.start if higher_is_better else y.end
    dots = [(x.at(best[0].x), level)]
    for point in best:
        dots += [(x.at(point.x), dots[-1][1]), (x.at(point.x), y.at(point.y))]
    return (*dots, (x.end, dots[-1][1]))


def _bars(point: Point, x: Scale, y: Scale) -> list[Line]:
    """Error bars of a point."""
    colour = COLOURS[point.series % len(COLOURS)]
    ends = []
    if point.x_range is not None:
        ends.append(((x.at(point.x_range[0]), y.at(point.y)), (x.at(point.x_range[1]), y.at(point.y))))
    if point.y_range is not None:
        ends.append(((x.at(point.x), y.at(point.y_range[0])), (x.at(point.x), y.at(point.y_range[1]))))
    return [Line(dots=dots, colour=colour, width=1.4, opacity=0.55) for dots in ends]


def _polygon(corners: int, turn: float = 0.0, size: float = 1.0) -> tuple[Dot, ...]:
    angles = [math.pi * (2 * k / corners + turn) for k in range(corners)]
    return tuple((size * math.sin(angle), -size * math.cos(angle)) for angle in angles)


def _cross() -> tuple[Dot, ...]:
    arm = ((0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4))
    return tuple(
        (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn))
        for turn in (0, math.pi / 2, math.pi, 3 * math.pi / 2)
        for x, y in arm[:3]
    )


#: outlines of markers around (0, 0): circle, square, triangles, diamond, plus, pentagon, hexagon
MARKERS = (
    _polygon(24),
    _polygon(4, 1 / 4, 1.25),
    _polygon(3, 0, 1.3),
    _polygon(4, 0, 1.3),
    _polygon(3, 1, 1.3),
    _cross(),
    _polygon(5, 0, 1.15),
    _polygon(6, 0, 1.15),
)


def _marker(point: Point, x: Scale, y: Scale, on_front: bool) -> list[Area | Line]:
    """A point's marker: filled on the front, hollow and fainter behind it."""
    colour = COLOURS[point.series % len(COLOURS)]
    outline = MARKERS[point.series % len(MARKERS)]
    dots = tuple((x.at(point.x) + MARKER * dx, y.at(point.y) + MARKER * dy) for dx, dy in outline)
    if on_front:
        return [Area(dots=dots, colour=colour)]
    return [Line(dots=(*dots, *dots[:2]), colour=colour, width=1.6, opacity=0.7)]


def _names(
    points: Sequence[Point], best: set[int], stairs: Sequence[Dot], hint: Words, x: Scale, y: Scale
) -> Iterator[Words | Line]:
    """Each point's name beside it, in the free place nearest to it, joined to it by a line where that is far."""
    centres = [(x.at(point.x), y.at(point.y)) for point in points]
    obstacles = [(cx - 6, cy - 6, cx + 6, cy + 6) for cx, cy in centres]
    bars = [bar.dots for point in points for bar in _bars(point, x, y)]
    obstacles += [_around(*ends) for ends in (*bars, *itertools.pairwise(stairs))]
    taken = [(hint.x, hint.y - SMALL / 2, hint.x + text_width(hint.text, SMALL), hint.y + SMALL / 2)]
    inside = (x.start, y.end - 8, x.end + RIGHT - 3, y.start)
    for i in sorted(range(len(points)), key=lambda i: (i not in best, centres[i][1])):
        name = clean(points[i].label) + (" (compiled)" if points[i].compiled else "")
        box, radius, side = _free_place(centres[i], text_width(name, NORMAL), obstacles, taken, inside)
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        place = {"start": box[0], "middle": (box[0] + box[2]) / 2, "end": box[2]}[side]
        yield Words(x=place, y=middle, text=name, anchor=side, opacity=1.0 if i in best else 0.75)
        if radius > RADII[1]:
            near = (min(max(centres[i][0], box[0]), box[2]), min(max(centres[i][1], box[1]), box[3]))
            yield Line(dots=(centres[i], near), width=0.8, opacity=0.35)


def _around(a: Dot, b: Dot) -> Box:
    """A box around a line along an axis."""
    return min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1


def _free_place(
    centre: Dot, width: float, obstacles: Sequence[Box], taken: Sequence[Box], inside: Box
) -> tuple[Box, float, Anchor]:
    """The cheapest box for a name of this width, its distance from the point, and its side that is next to that."""
    height = 1.2 * NORMAL
    found: tuple[float, Box, float, Anchor] = (math.inf, inside, 0.0, "start")
    for radius, (dx, dy) in itertools.product(RADII, DIRECTIONS):
        side: Anchor = "start" if dx > 0.01 else "end" if dx < -0.01 else "middle"
        left = centre[0] + radius * dx - {"start": 0.0, "middle": width / 2, "end": width}[side]
        top = centre[1] + radius * dy - height / 2 + height / 2 * dy
        box = (left, top, left + width, top + height)
        clash = 6 * sum(_overlap(box, other) for other in taken) + 2 * sum(_overlap(box, other) for other in obstacles)
        clash += 8 * (width * height - _overlap(box, inside))
        cost = clash / max(width * height, 1.0) + radius / 100
        if cost < found[0]:
            found = (cost, box, radius, side)
        if clash < 1e-6:  # what is farther away cannot be cheaper
            break
    return found[1:]


def _overlap(a: Box, b: Box) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0
