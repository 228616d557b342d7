"""Figures: the front by hand and by brute force, labels that keep apart, SVG that is safe and stable."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pareto_runner import plots
from pareto_runner.plots import Line, Panel, Point


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


def test_names_of_neighbours_do_not_touch() -> None:
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
    figure = plots.pareto_figure([panel(*crowd)])
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [text for text in figure.axes[0].texts if text.get_text().startswith("A variant")]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_svg_is_well_formed_themed_and_reproducible() -> None:
    some = points((1, 70), (50, 80), (20_000_000, 90))
    hostile = Point(label="<script>alert('$x$')</script>", x=3, y=75, y_range=(74, 76), compiled=True)
    texts = [plots.svg(plots.pareto_figure([panel(*some, hostile)] * 2)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert "<script" not in texts[0]
    assert "currentColor" in texts[0]
    assert "prefers-color-scheme:dark" in texts[0]
    words = "".join(ElementTree.fromstring(texts[0].split("\n", 1)[1]).itertext())
    assert "<script>alert('$x$')</scri" in words  # shown as text, cut to the length of a label


def test_inline_svg_has_prefixed_identifiers_and_no_size() -> None:
    text = plots.svg(plots.pareto_figure([panel(*points((1, 70), (2, 80)))]), "q1-", standalone=False)
    assert text.startswith("<svg")
    head = text[: text.index(">")]
    assert "width=" not in head
    assert "viewBox=" in head
    assert 'id="q1-' in text
    assert 'id="figure' not in text


def test_equal_and_zero_costs_can_be_drawn(tmp_path: Path) -> None:
    figure = plots.pareto_figure([panel(*points((0, 70), (0, 70)))])
    plots.save_png(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_curves_name_every_line() -> None:
    lines = [
        Line(label=f"variant {i}", series=i, steps=(1, 2, 3), mean=(3, 2, 1), low=(3, 2, 1), high=(3, 2, 1))
        for i in (0, 1)
    ]
    text = plots.svg(plots.curves_figure(lines))
    assert "variant 0" in text
    assert "variant 1" in text
    written = re.findall(r"<text ([^>]*)", text)
    assert written
    assert all("currentColor" in style for style in written)  # light on dark screens


def test_clean_cuts_and_removes_what_cannot_be_printed() -> None:
    assert plots.clean("a\x00b\n c") == "a b c"
    assert plots.clean("x" * 40) == "x" * 27 + "…"
