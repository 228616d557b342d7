"""Figures: the front by hand and by brute force, labels that keep apart, SVG and PNG that are safe and stable."""

from __future__ import annotations

import dataclasses
import itertools
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pareto_runner import plots
from pareto_runner.drawing import Area, Line, Picture, Words, beside, text_width
from pareto_runner.plots import Curve, Panel, Point, Scale


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(label=f"p{i}", x=x, y=y, series=i) for i, (x, y) in enumerate(pairs)]


def test_the_front_by_hand() -> None:
    some = points((2, 80), (1, 70), (3, 75), (4, 90), (1, 60))
    assert plots.front(some) == [1, 0, 3]  # 2 is beaten by 0, 4 by 1
    assert plots.front(some, higher_is_better=False) == [4]  # lowest cost and lowest score


def test_equal_points_share_the_front_and_compiled_ones_are_left_out() -> None:
    assert plots.front(points((1, 70), (1, 70), (2, 70))) == [0, 1]
    assert plots.front([Point(label="c", x=0, y=99, compiled=True), *points((1, 70))]) == [1]
    assert plots.front([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9), st.booleans())
def test_the_front_is_what_nothing_dominates(pairs: list[tuple[int, int]], higher: bool) -> None:
    sign = 1 if higher else -1

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and sign * a[1] >= sign * b[1]

    expected = {i for i, b in enumerate(pairs) if not any(beats(a, b) for a in pairs)}
    assert set(plots.front(points(*pairs), higher)) == expected


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 2))
def test_spread_keeps_order_and_distance(wanted: list[float], gap: float) -> None:
    placed = plots.spread(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(placed[b] - placed[a] >= gap - 1e-9 for a, b in itertools.pairwise(order))


def test_spread_by_hand() -> None:
    assert plots.spread([1.0, 1.0, 5.0], 1.0) == pytest.approx([0.5, 1.5, 5.0])


def panel(*some: Point) -> Panel:
    return Panel(name="latency", x_label="Latency (ms)", y_label="Accuracy (%)", points=some)


def words(picture: Picture) -> list[Words]:
    return [item for item in picture.items if isinstance(item, Words)]


def box(item: Words) -> tuple[float, float, float, float]:
    width = text_width(item.text, item.size)
    left = item.x - {"start": 0.0, "middle": width / 2, "end": width}[item.anchor]
    return left, item.y - item.size / 2, left + width, item.y + item.size / 2


def apart(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_names_of_neighbours_do_not_touch_and_stay_inside() -> None:
    crowd = [
        Point(
            label=f"A variant, number {i}",
            x=4 + 0.01 * i,
            y=70 + 0.3 * i,
            series=i,
            x_range=(3.9, 4.3),
            y_range=(69, 71),
        )
        for i in range(6)
    ]
    picture = plots.pareto_picture(panel(*crowd))
    boxes = [box(item) for item in words(picture) if item.text.startswith("A variant")]
    assert len(boxes) == 6
    assert all(apart(a, b) for a, b in itertools.combinations(boxes, 2))
    assert all(left >= 0 and right <= picture.width for left, _, right, _ in boxes)


def test_points_lie_where_the_axes_say() -> None:
    picture = plots.pareto_picture(panel(*points((10, 70), (20, 80))))
    ticks = {item.text: item for item in words(picture) if item.text.isdigit()}
    assert {"10", "20", "70", "80"} <= set(ticks)
    first, second = (item for item in picture.items if isinstance(item, Area))
    for marker, (x, y) in ((first, ("10", "70")), (second, ("20", "80"))):
        middle = [sum(part) / len(marker.dots) for part in zip(*marker.dots, strict=True)]
        assert middle == pytest.approx([ticks[x].x, ticks[y].y], abs=0.5)


def test_what_is_not_on_the_front_is_hollow() -> None:
    picture = plots.pareto_picture(panel(*points((1, 80), (2, 70))))
    assert len([item for item in picture.items if isinstance(item, Area)]) == 1
    both = plots.pareto_picture(dataclasses.replace(panel(*points((1, 80), (2, 70))), higher_is_better=False))
    assert len([item for item in both.items if isinstance(item, Area)]) == 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (12.1, 18.3, [13, 14, 15, 16, 17, 18]),
        (-3.0, 3.0, [-2, 0, 2]),
        (686.0, 694.0, [686, 688, 690, 692, 694]),
    ],
)
def test_linear_ticks(low: float, high: float, expected: list[float]) -> None:
    assert plots.linear_ticks(low, high) == pytest.approx(expected)


@given(st.floats(-200, 200), st.floats(1e-6, 1e6))
def test_linear_ticks_are_few_and_evenly_inside(start: float, length: float) -> None:
    low = start * length
    ticks = plots.linear_ticks(low, low + length)
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-6 * length <= tick <= low + length + 1e-6 * length for tick in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


def test_log_ticks() -> None:
    assert plots.log_ticks(5e3, 3e7) == pytest.approx([1e4, 1e5, 1e6, 1e7])
    assert plots.log_ticks(3, 60) == pytest.approx([5, 10, 20, 50])
    assert len(plots.log_ticks(1e-12, 1e12)) <= 6


def test_words_of_ticks() -> None:
    assert [plots.tick_text(value, 2.5e7) for value in (0, 10_000, 250_000, 1e6, 2.5e7)] == [
        "0",
        "10k",
        "250k",
        "1M",
        "25M",
    ]
    assert [plots.tick_text(value, 1.0) for value in (0.1 + 0.2, 1e-17, 0.25)] == ["0.3", "0", "0.25"]


def test_scales() -> None:
    assert Scale(0, 10, 100, 200).at(5) == 150
    assert Scale(1, 100, 0, 10, logarithmic=True).at(10) == pytest.approx(5)
    assert Scale(0, 10, 100, 200).at(1e30) == 300  # far outside, but somewhere a picture can say


def test_wide_costs_get_a_logarithmic_axis() -> None:
    picture = plots.pareto_picture(panel(*points((1e4, 70), (1e5, 75), (2e7, 80))))
    ticks = {item.text: item.x for item in words(picture)}
    assert ticks["1M"] - ticks["100k"] == pytest.approx(ticks["100k"] - ticks["10k"])


def test_svg_is_well_formed_themed_and_reproducible() -> None:
    some = points((1, 70), (50, 80), (20_000_000, 90))
    hostile = Point(label="<script>alert('$x$')</script>", x=3, y=75, y_range=(74, 76), compiled=True)
    pictures = [plots.pareto_picture(panel(*some, hostile)) for _ in range(2)]
    texts = [beside([picture, picture]).svg('a "title" <b>', standalone=True) for picture in pictures]
    assert texts[0] == texts[1]
    assert "<script" not in texts[0]
    assert "prefers-color-scheme:dark" in texts[0]
    root = ElementTree.fromstring(texts[0].split("\n", 1)[1])
    assert root.get("aria-label") == 'a "title" <b>'
    assert "<script>alert('$x$')</scrip… (compiled)" in "".join(root.itertext())  # as text, cut to a label's length
    written = [item for item in root.iter() if item.tag.endswith("text")]
    assert written
    assert {item.get("fill") for item in written} == {"currentColor"}  # light on dark screens


def test_inline_svg_takes_the_size_and_ink_of_its_page() -> None:
    text = plots.pareto_picture(panel(*points((1, 70), (2, 80)))).svg("title")
    head = text[: text.index(">")]
    assert text.startswith("<svg viewBox=")
    assert " width=" not in head
    assert "<style" not in text
    assert " id=" not in text  # several share a page


def test_pictures_stand_beside_each_other() -> None:
    one = Picture(100, 50, [Line(dots=((0, 0), (10, 10))), Words(x=5, y=5, text="a")])
    two = Picture(60, 80, [Area(dots=((0, 0), (1, 0), (0, 1)))])
    both = beside([one, two])
    assert (both.width, both.height) == (160, 80)
    assert both.items == [*one.items, Area(dots=((100, 0), (101, 0), (100, 1)))]


def test_a_png_shows_what_was_drawn(tmp_path: Path) -> None:
    from PIL import Image

    picture = Picture(100, 50)
    picture.items.append(Area(dots=((0, 0), (50, 0), (50, 50), (0, 50)), colour="#D55E00"))
    picture.items.append(Line(dots=((75, 0), (75, 50)), colour="#009E73", width=4))
    picture.items.append(Words(x=90, y=25, text="upwards", upwards=True, anchor="middle"))
    picture.save_png(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png").convert("RGB")
    scale = image.width / 100
    for (x, y), colour in {(25, 25): (0xD5, 0x5E, 0), (75, 25): (0, 0x9E, 0x73), (62, 10): (255, 255, 255)}.items():
        assert image.getpixel((round(x * scale), round(y * scale))) == pytest.approx(colour, abs=3)
    dark = [
        (x, y) for x in range(image.width) for y in range(image.height) if max(image.getpixel((x, y))) < 120
    ]  # the ink of the words
    assert max(x for x, _ in dark) - min(x for x, _ in dark) < max(y for _, y in dark) - min(y for _, y in dark)


def test_equal_and_zero_costs_can_be_drawn(tmp_path: Path) -> None:
    picture = plots.pareto_picture(panel(*points((0, 70), (0, 70))))
    picture.save_png(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    flat = plots.pareto_picture(panel(*points((0, 0), (0, 0))))
    assert all(math.isfinite(item.x) for item in words(flat))


def test_curves_name_every_line_at_its_end() -> None:
    curves = [
        Curve(label=f"variant {i}", series=i, steps=(1, 2, 3), mean=(3, 2, i), low=(3, 2, i), high=(3, 2.5, i))
        for i in (0, 1)
    ]
    picture = plots.curves_picture(curves)
    names = {item.text: item for item in words(picture)}
    lines = [item for item in picture.items if isinstance(item, Line) and item.width == 2]
    for i, line in enumerate(lines):
        assert names[f"variant {i}"].x > line.dots[-1][0]
        assert names[f"variant {i}"].y == pytest.approx(line.dots[-1][1], abs=0.1)
        assert box(names[f"variant {i}"])[2] <= picture.width
    assert len([item for item in picture.items if isinstance(item, Area)]) == 2  # the bands between the seeds


def test_clean_cuts_and_removes_what_cannot_be_printed() -> None:
    assert plots.clean("a\x00b\n c") == "a b c"
    assert plots.clean("x" * 40) == "x" * 27 + "…"
