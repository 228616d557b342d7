"""Pictures of two long dashed contours among short ones, with a mark at an end of each or at both ends of one.

D. Linsley, J. Kim, V. Veerabadran, C. Windolf, T. Serre, "Learning long-range spatial dependencies with horizontal
gated recurrent units", 2018, https://arxiv.org/abs/1805.08315; the numbers are those that the Long Range Arena gives
for its pictures of 32 and of 128 pixels (Y. Tay et al., 2021, https://arxiv.org/abs/2011.04006).

A contour grows dash by dash. Behind a dash there is a gap of twice the margin; the next one starts there, towards one
of the pixels on a circle, with probability in proportion to cos² of the turn times ``continuity``. No dash comes nearer
to another (but its neighbours on the contour) or to the border than about twice the margin. The two long contours grow
in turn from near the middle; short ones are put wherever there is room.

Deviations from the published program: dashes are drawn with round ends and averaged over 8 × 8 points per pixel, not by
an image library; coordinates are rounded to the nearest pixel, not up; directions without room are left out before one
is drawn, not after; the last dashes of the two growing contours keep clear of each other too; and all contours have one
contrast (the published one draws short ones brighter at 32 pixels, which gives them away).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

#: points per pixel, along each axis, over which a drawing is averaged
POINTS = 8
#: attempts at a first dash, and at a whole short contour; a long one is tried until it succeeds
SEED_TRIALS, DISTRACTOR_TRIALS = 32, 5


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Lengths in pixels: of the picture's side, a dash, its width, the margins to draw from, and so on.

    ``contour`` and ``distractor`` are dashes of a long and a short contour, ``distractors`` how many short ones.
    """

    size: int
    dash: int
    thickness: float
    margins: tuple[int, ...]
    seed_distance: int
    marker_radius: float
    contour: int
    distractor: int
    distractors: int
    continuity: float
    contrast: float
    padding: int = 1


def geometry(size: int, contour: int) -> Geometry:
    """Return the published numbers for pictures of ``size`` 32 or 128 and long contours of ``contour`` dashes."""
    distractor = contour // 3
    if size == 32:
        return Geometry(32, 2, 0.5, (1,), 7, 1.5, contour, distractor, math.ceil(60 / contour), 1.0, 1.5)
    return Geometry(128, 5, 1.5, (2, 3), 20, 3.0, contour, distractor, math.ceil(105 / contour), 1.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture (size, size) of bytes; the dashes (number, 2, 2) of each contour as (y, x) of start and end.

    The first two contours are the long ones; ``marks`` (2, 2) are the centres of the two marks.
    """

    picture: np.ndarray
    contours: tuple[np.ndarray, ...]
    marks: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Turns:
    """How a contour may go on from a dash in some direction, with coordinates and places relative to its pivot.

    ``step`` leads from its pivot to the next one; from there, each turn has where its dash ends, its direction, its
    probability (summed up, not normalised), and the places that must be free, also as a table (turns, places).
    """

    step: tuple[int, int]
    heads: tuple[tuple[int, int], ...]
    angles: tuple[float, ...]
    weights: np.ndarray
    cells: tuple[np.ndarray, ...]
    table: np.ndarray


class _Grid:
    """How many dashes claim each pixel, with an apron around the picture that is claimed from the start."""

    def __init__(self, shape: Geometry, margin: int) -> None:
        self.shape, self.margin = shape, margin
        self.apron = 3 * (shape.dash + 2 * margin) + math.ceil(shape.thickness) + 4
        self.width = shape.size + 2 * self.apron
        claimed = np.ones((self.width, self.width), np.uint8)
        inner = slice(self.apron + shape.padding, self.apron + shape.size - shape.padding)
        claimed[inner, inner] = 0
        self.claimed = claimed.reshape(-1)

    def place(self, y: Any, x: Any) -> Any:
        """Places in the grid of the pixels (y, x), integers or arrays of them."""
        return (y + self.apron) * self.width + x + self.apron


class _Contour:
    """A growing contour: its dashes, the direction of the last one, and the point that this one turned at."""

    def __init__(self, grid: _Grid, tail: np.ndarray, angle: float) -> None:
        back = np.rint(tail - grid.margin * _direction(angle))
        self.angle, self.pivot = angle, (int(back[0]), int(back[1]))
        self.dashes = [(tail.astype(float), tail + grid.shape.dash * _direction(angle))]
        self.cells = grid.place(*tail) + _dash_cells(grid.shape, grid.margin, grid.width, angle)
        grid.claimed[self.cells] += 1

    def extend(self, grid: _Grid, random: np.random.Generator) -> bool:
        """Add a dash; False where no direction has room."""
        shape = grid.shape
        turns = _turns(shape, grid.margin, grid.width, self.angle)
        y, x = self.pivot[0] + turns.step[0], self.pivot[1] + turns.step[1]
        if not (0 <= y < shape.size and 0 <= x < shape.size):
            return False
        pivot = grid.place(y, x)
        grid.claimed[self.cells] -= 1  # the dash before may be near
        free = grid.claimed.take(turns.table + pivot).max(1) == 0
        grid.claimed[self.cells] += 1
        weights = (free * turns.weights).cumsum()
        if weights[-1] < 1e-4:
            return False
        chosen = int(weights.searchsorted(random.random() * weights[-1], side="right"))
        self.pivot, self.angle, self.cells = (y, x), turns.angles[chosen], turns.cells[chosen] + pivot
        head = np.array([y + turns.heads[chosen][0], x + turns.heads[chosen][1]], float)
        self.dashes.append((head - shape.dash * _direction(self.angle), head))
        grid.claimed[self.cells] += 1
        return True


def draw_scene(random: np.random.Generator, shape: Geometry, connected: bool) -> Scene:
    """Draw a picture whose marks are at both ends of one long contour (``connected``), or at one end of each."""
    margin = int(random.choice(shape.margins))
    pair = None
    while pair is None:
        grid = _Grid(shape, margin)
        pair = _long_pair(grid, random)
    contours = list(pair)
    for _ in range(shape.distractors):
        contours += _short(grid, random)
    first = int(random.integers(2))
    last = first if connected else 1 - first
    marks = np.stack([pair[first].dashes[0][0], pair[last].dashes[-1][1]])
    dashes = tuple(np.array(contour.dashes) for contour in contours)
    return Scene(_render(shape, dashes, marks), dashes, marks)


def _long_pair(grid: _Grid, random: np.random.Generator) -> tuple[_Contour, _Contour] | None:
    """Two long contours that start near each other in the middle; None where one of them runs out of room."""
    shape = grid.shape
    border = min(2 * shape.seed_distance, (shape.size - 1) // 2)
    tail = random.integers(border, shape.size - border, size=2)
    first = _Contour(grid, tail, _angle(random))
    for _ in range(SEED_TRIALS):
        other = np.rint(tail + shape.seed_distance * _direction(_angle(random))).astype(int)
        second = _start(grid, random, other[None])
        if second is not None:
            break
    else:
        return None
    for _ in range(shape.contour - 1):
        if not first.extend(grid, random) or not second.extend(grid, random):
            return None
    return first, second


def _short(grid: _Grid, random: np.random.Generator) -> list[_Contour]:
    """A short contour anywhere, in a list; an empty list where there is no room for one."""
    for _ in range(DISTRACTOR_TRIALS):
        before = grid.claimed.copy()
        contour = _start(grid, random, random.integers(0, grid.shape.size, size=(64, 2)))
        if contour is not None and all(contour.extend(grid, random) for _ in range(grid.shape.distractor - 1)):
            return [contour]
        grid.claimed = before
    return []


def _start(grid: _Grid, random: np.random.Generator, tails: np.ndarray) -> _Contour | None:
    """A contour of one dash, in a random direction, at the first of the ``tails`` (number, 2) with room for it."""
    angle = _angle(random)
    cells = _dash_cells(grid.shape, grid.margin, grid.width, angle)
    free = ~grid.claimed[grid.place(tails[:, 0], tails[:, 1])[:, None] + cells].any(1)
    return _Contour(grid, tails[int(free.argmax())], angle) if free.any() else None


def _angle(random: np.random.Generator) -> float:
    """A whole number of degrees, in radians from −π to π."""
    return math.radians(int(random.integers(-180, 180)))


def _direction(angle: float) -> np.ndarray:
    return np.array([math.sin(angle), math.cos(angle)])


def _distance(points: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distances of ``points`` (..., 2) from the line between the origin and ``end``."""
    share = np.clip((points @ end) / max(float(end @ end), 1e-12), 0.0, 1.0)
    return np.asarray(np.linalg.norm(points - share[..., None] * end, axis=-1))


def _pixels(radius: int) -> np.ndarray:
    """Coordinates (2 radius + 1, 2 radius + 1, 2) of the pixels around the origin."""
    line = np.arange(-radius, radius + 1)
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1)


@functools.lru_cache(maxsize=4096)
def _dash_cells(shape: Geometry, margin: int, width: int, angle: float) -> np.ndarray:
    """Pixels that a dash from the origin in direction ``angle`` claims, as differences of places in the grid."""
    points = _pixels(shape.dash + margin + math.ceil(shape.thickness)).reshape(-1, 2)
    near = points[_distance(points, shape.dash * _direction(angle)) <= margin + shape.thickness / 2]
    return np.asarray(near[:, 0] * width + near[:, 1])


@functools.lru_cache(maxsize=4096)
def _turns(shape: Geometry, margin: int, width: int, angle: float) -> _Turns:
    """The turns after a dash in direction ``angle``, without those that ``continuity`` forbids."""
    reach = shape.dash + margin
    around = np.arange(0.0, 2 * math.pi, 1 / reach)  # a step of one pixel
    heads = np.unique(np.rint(reach * np.stack([np.sin(around), np.cos(around)], 1)).astype(int), axis=0)
    angles = np.arctan2(heads[:, 0], heads[:, 1])
    turn = np.abs(angles - angle)
    turn = np.minimum(np.minimum(turn, 2 * math.pi - turn) * shape.continuity, math.pi / 2)
    weights = np.cos(turn) ** 2
    kept = np.flatnonzero(weights > 1e-9)
    cells = []
    for number in kept:
        back = float(angles[number]) + (math.pi if angles[number] < 0 else -math.pi)
        cells.append(heads[number, 0] * width + heads[number, 1] + _dash_cells(shape, margin, width, back))
    longest = max(map(len, cells))
    table = np.stack([np.resize(row, longest) for row in cells])  # filled up with repetitions
    step = np.rint((shape.dash + 2 * margin) * _direction(angle))
    ends = tuple((int(y), int(x)) for y, x in heads[kept])
    return _Turns((int(step[0]), int(step[1])), ends, tuple(angles[kept].tolist()), weights[kept], tuple(cells), table)


def _render(shape: Geometry, contours: tuple[np.ndarray, ...], marks: np.ndarray) -> np.ndarray:
    """The picture (size, size) of bytes: the brightest of all that covers a pixel."""
    radius = shape.dash + math.ceil(shape.thickness) + 1
    edge = 2 * radius + math.ceil(shape.marker_radius)
    picture = np.zeros((shape.size + 2 * edge, shape.size + 2 * edge))
    for dashes in contours:
        for place, (tail, head) in enumerate(dashes):
            # The end that lies on a pixel: the first dash's start, all others' end.
            start, end = (tail, head) if place == 0 else (head, tail)
            ink = _dash_ink(shape, round(float(end[0] - start[0]), 6), round(float(end[1] - start[1]), 6))
            _paste(picture, np.rint(start).astype(int) + edge, ink)
    for mark in marks:
        _paste(picture, np.rint(mark).astype(int) + edge, _mark_ink(shape.marker_radius))
    inner = picture[edge : edge + shape.size, edge : edge + shape.size]
    return np.rint(255 * inner).astype(np.uint8)


def _paste(picture: np.ndarray, centre: np.ndarray, ink: np.ndarray) -> None:
    top, left = centre - len(ink) // 2
    window = picture[top : top + len(ink), left : left + len(ink)]
    np.maximum(window, ink, out=window)


@functools.lru_cache(maxsize=8192)
def _dash_ink(shape: Geometry, dy: float, dx: float) -> np.ndarray:
    """Ink of a dash from the origin to (dy, dx), over the pixels around the origin."""
    points = _fine(shape.dash + math.ceil(shape.thickness) + 1)
    covered = _distance(points, np.array([dy, dx])) <= shape.thickness / 2
    return np.asarray(np.minimum(shape.contrast * covered.mean((2, 3)), 1.0))


@functools.lru_cache(maxsize=8)
def _mark_ink(radius: float) -> np.ndarray:
    return np.asarray((np.linalg.norm(_fine(math.ceil(radius)), axis=-1) <= radius).mean((2, 3)))


def _fine(radius: int) -> np.ndarray:
    """Points (side, side, POINTS, POINTS, 2) within the pixels around the origin."""
    inside = (np.arange(POINTS) + 0.5) / POINTS - 0.5
    offsets = np.stack(np.meshgrid(inside, inside, indexing="ij"), -1)
    return np.asarray(_pixels(radius)[:, :, None, None] + offsets)
