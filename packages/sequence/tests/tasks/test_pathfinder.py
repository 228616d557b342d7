from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pareto_core import ConfigError
from pareto_sequence.tasks.pathfinder import Pathfinder
from pareto_sequence.tasks.pathfinder_drawing import Scene, draw_scene, geometry

SMALL = Pathfinder(contour_length=6, train_items=24, dev_items=6, test_items=10)
#: pixels of the fine grid, per pixel, on which contours are drawn as lines
FINE = 16


def skeleton(scene: Scene, size: int) -> np.ndarray:
    """Every contour as one line through its dashes and gaps, on a grid FINE times as fine."""
    grid = np.zeros(((size + 2) * FINE, (size + 2) * FINE), bool)
    for dashes in scene.contours:
        for start, end in itertools.pairwise(dashes.reshape(-1, 2)):
            steps = 4 * FINE * (1 + int(np.linalg.norm(end - start)))
            points = start + np.linspace(0, 1, steps)[:, None] * (end - start)
            places = np.rint((points + 1) * FINE).astype(int)
            grid[places[:, 0], places[:, 1]] = True
    return grid


def separation(first: np.ndarray, second: np.ndarray) -> float:
    """Least distance between points of two dashes (2, 2)."""
    share = np.linspace(0, 1, 41)[:, None]
    a, b = (start + share * (end - start) for start, end in (first, second))
    return float(np.linalg.norm(a[:, None] - b[None], axis=-1).min())


@pytest.mark.parametrize(("size", "contour", "count"), [(32, 14, 30), (32, 6, 30), (128, 14, 8)])
def test_marks_are_connected_where_the_label_says_so(size: int, contour: int, count: int) -> None:
    from scipy import ndimage

    task = Pathfinder(image_size=size, contour_length=contour)
    joined = 0
    for number in range(count):
        scene = task.scene("test", number)
        grid = skeleton(scene, size)
        names, parts = ndimage.label(grid, np.ones((3, 3)))
        assert parts == len(scene.contours)  # no contour meets another
        ends = [names[tuple(np.rint((mark + 1) * FINE).astype(int))] for mark in scene.marks]
        assert all(ends)
        assert (ends[0] == ends[1]) == (number % 2 == 1)
        joined += ends[0] == ends[1]
    assert joined == count // 2


@pytest.mark.parametrize("size", [32, 128])
def test_contours_have_the_published_measures(size: int) -> None:
    shape = geometry(size, 14)
    assert (shape.distractor, shape.distractors) == (4, 5 if size == 32 else 8)
    for number in range(6):
        scene = draw_scene(np.random.default_rng(number), shape, connected=True)
        assert [len(dashes) for dashes in scene.contours[:2]] == [14, 14]
        assert {len(dashes) for dashes in scene.contours[2:]} <= {4}
        assert 1 <= len(scene.contours) - 2 <= shape.distractors
        for dashes in scene.contours:
            assert np.linalg.norm(dashes[:, 1] - dashes[:, 0], axis=1) == pytest.approx(shape.dash)
            assert dashes.min() >= shape.padding
            assert dashes.max() <= size - 1 - shape.padding
            gaps = np.linalg.norm(dashes[1:, 0] - dashes[:-1, 1], axis=1)
            # Twice the margin where the contour goes straight on; coordinates are rounded, and turns shorten it.
            assert gaps.max() <= 2 * max(shape.margins) + 2
            steps = dashes[:, 1] - dashes[:, 0]
            cosines = (steps[1:] * steps[:-1]).sum(1) / shape.dash**2
            # No turn of 90° / continuity or more.
            assert np.degrees(np.arccos(np.clip(cosines, -1, 1))).max() < 90 / shape.continuity
        starts = [scene.contours[i][0, 0] for i in (0, 1)]
        assert np.linalg.norm(starts[0] - starts[1]) == pytest.approx(shape.seed_distance, abs=0.75)


@pytest.mark.parametrize("size", [32, 128])
def test_dashes_keep_their_distance(size: int) -> None:
    shape = geometry(size, 14)
    least = 2 * min(shape.margins) + shape.thickness - 2**0.5
    for number in range(4):
        scene = draw_scene(np.random.default_rng(number), shape, connected=False)
        every = [(i, j, dash) for i, dashes in enumerate(scene.contours) for j, dash in enumerate(dashes)]
        for (i, j, first), (k, m, second) in itertools.combinations(every, 2):
            if i != k or abs(j - m) > 1:
                assert separation(first, second) > least


def covered(size: int, points: np.ndarray, inside: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Share of each pixel of the picture that lies ``inside``, over 20 × 20 points; all of that is near ``points``."""
    low, high = np.floor(points.min(0)).astype(int) - 4, np.ceil(points.max(0)).astype(int) + 4
    sides = high - low
    y, x = (low[i] + (np.arange(20 * sides[i]) + 0.5) / 20 - 0.5 for i in (0, 1))
    share = inside(*np.meshgrid(y, x, indexing="ij")).reshape(sides[0], 20, sides[1], 20).mean((1, 3))
    around = np.zeros((size + 16, size + 16))
    around[low[0] + 8 : high[0] + 8, low[1] + 8 : high[1] + 8] = share
    return around[8:-8, 8:-8]


def near_line(start: np.ndarray, end: np.ndarray, radius: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Whether points are within ``radius`` of either end, or beside the line between them."""

    def inside(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        u, v = (end - start) / np.linalg.norm(end - start)
        along = (y - start[0]) * u + (x - start[1]) * v
        aside = np.abs((y - start[0]) * v - (x - start[1]) * u)
        ends = [np.hypot(y - point[0], x - point[1]) <= radius for point in (start, end)]
        beside = (aside <= radius) & (along >= 0) & (along <= np.linalg.norm(end - start))
        return ends[0] | ends[1] | beside

    return inside


@pytest.mark.parametrize("size", [32, 128])
def test_pictures_show_the_dashes_and_the_marks(size: int) -> None:
    shape = geometry(size, 9)
    scene = draw_scene(np.random.default_rng(5), shape, connected=True)
    ink = np.zeros((size, size))
    for dash in np.concatenate(scene.contours):
        share = covered(size, dash, near_line(*dash, shape.thickness / 2))
        ink = np.maximum(ink, np.minimum(shape.contrast * share, 1.0))
    for mark in scene.marks:
        assert np.array_equal(mark, np.rint(mark))
        assert scene.picture[tuple(mark.astype(int))] == 255
        disc = covered(
            size, mark[None], lambda y, x, mark=mark: np.hypot(y - mark[0], x - mark[1]) <= shape.marker_radius
        )
        ink = np.maximum(ink, disc)
    error = np.abs(scene.picture / 255 - ink)
    # 8 × 8 points per pixel: a line half a pixel wide is four of them wide.
    assert error.max() < 0.2 * max(shape.contrast, 1.0)
    assert error[ink > 0].mean() < 0.03
    assert (scene.picture[ink == 0] == 0).all()


def test_pictures_are_balanced_repeatable_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bag: Any) -> None:
    batches = list(SMALL.batches("train", 8, 0))
    assert len(batches) == 3
    assert sum(int(batch["labels"].sum()) for batch in batches) == 12
    values = batches[0]["input_values"]
    assert values.shape == batches[0]["attention_mask"].shape == (8, 1024)
    assert 0.0 <= float(values.min()) < float(values.max()) <= 1.0
    direct = np.stack([SMALL.scene("dev", n).picture.reshape(-1) for n in range(6)])
    again = Pathfinder(**SMALL.to_json())
    # The second task reads what the first one kept: nothing is drawn.
    SMALL.items("dev")
    with monkeypatch.context() as patch:
        patch.setattr(Pathfinder, "_write", None)
        assert np.array_equal(again.items("dev").rows, direct)
    assert [path.name for path in (tmp_path / "cache" / "pathfinder").glob(".*")] == []
    assert again.data_revision() == SMALL.data_revision()
    other = Pathfinder(**{**SMALL.to_json(), "seed": 1})
    assert not np.array_equal(other.items("dev").rows, direct)
    assert other.data_revision() != SMALL.data_revision()
    assert not np.array_equal(SMALL.items("test").rows[:6], direct)
    records = SMALL.records(bag(2), "test")
    assert [record.label for record in records] == ["apart", "joined"] * 5


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Pathfinder(**{**SMALL.to_json(), "seed": 9})
    monkeypatch.setattr(Pathfinder, "scene", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        task._write(tmp_path / "kept" / "x.npy", "dev", 3)
    assert list((tmp_path / "kept").iterdir()) == []


def test_sizes_and_lengths() -> None:
    assert SMALL.spec.max_length == 1024
    assert Pathfinder(image_size=128).spec.max_length == 16384
    for fields, field in [({"image_size": 64}, "image_size"), ({"contour_length": 15}, "contour_length")]:
        with pytest.raises(ConfigError) as caught:
            Pathfinder.from_json(fields)
        assert caught.value.field == field
