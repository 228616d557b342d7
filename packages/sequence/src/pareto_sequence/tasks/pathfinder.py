"""Pathfinder-like and Path-X-like: are the two marks joined by a dashed line (table 7.3)? Pixels in one row.

The pictures are drawn by :mod:`pareto_sequence.tasks.pathfinder_drawing`, whose docstring has the sources, the rules
and the deviations: results are not those of the published pictures. At 32 pixels a sequence has 1,024 positions, at 128
pixels (Path-X) 16,384. Every second item's marks are joined. Pictures are kept in the cache directory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from pareto_core.cache import cache_directory
from pareto_core.task import Split, TaskSpec
from pareto_sequence.tasks.base import Inputs, Items, SequenceClassification, revision_of
from pareto_sequence.tasks.pathfinder_drawing import Geometry, Scene, draw_scene, geometry

RULE = "pathfinder-like 1"
#: makes the random streams of the splits differ
STREAMS: dict[Split, int] = {"train": 0, "dev": 1, "test": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pathfinder(SequenceClassification):
    """Pictures of ``image_size``² pixels in [0, 1], drawn by ``seed``.

    ``contour_length`` is the number of dashes of the two long contours: 6, 9 and 14 are the published easy,
    intermediate and hard sets; the Long Range Arena takes the hard one, 200,000 pictures split 8 : 1 : 1.
    """

    name: ClassVar[str] = "sequence.pathfinder"
    inputs: ClassVar[Inputs] = "values"

    image_size: Literal[32, 128] = 32
    contour_length: int = 14
    train_items: int = 160_000
    dev_items: int = 20_000
    test_items: int = 20_000
    seed: int = 0

    def validate(self) -> None:
        """Check ranges."""
        for field in ("train_items", "dev_items", "test_items"):
            self.require(field, getattr(self, field) > 0, "must be above 0")
        self.require("contour_length", 3 <= self.contour_length <= 14, "must be from 3 to 14")
        self.require("seed", self.seed >= 0, "must not be negative")

    @property
    def spec(self) -> TaskSpec:
        """Two classes; as many positions as pixels."""
        return TaskSpec(("apart", "joined"), 0, self.image_size**2)

    @property
    def geometry(self) -> Geometry:
        """The published numbers for this size."""
        return geometry(self.image_size, self.contour_length)

    def scene(self, split: Split, number: int) -> Scene:
        """Draw item ``number`` of ``split``; it does not depend on the others."""
        random = np.random.default_rng([self.seed, STREAMS[split], number])
        return draw_scene(random, self.geometry, connected=number % 2 == 1)

    def read(self, split: Split) -> Items:
        """Draw the pictures of ``split``, or take them from the cache, from which they are read where they are used."""
        count = {"train": self.train_items, "dev": self.dev_items, "test": self.test_items}[split]
        key = hashlib.sha256(f"{RULE} {self._sample} {self.geometry} {self.seed}".encode()).hexdigest()[:16]
        path = cache_directory() / "pathfinder" / f"{key}-{split}-{count}.npy"
        if not path.is_file():
            self._write(path, split, count)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        return Items(rows, np.arange(count) % 2, np.full(count, self.image_size**2), scale=1 / 255)

    def _write(self, path: Path, split: Split, count: int) -> None:
        from tqdm import trange

        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        try:
            rows = np.lib.format.open_memmap(made, "w+", np.uint8, (count, self.image_size**2))
            for number in trange(count, desc=f"Pathfinder {split}", unit="picture", disable=None, leave=False):
                rows[number] = self.scene(split, number).picture.reshape(-1)
            rows.flush()
            os.replace(made, path)
        except BaseException:
            os.unlink(made)
            raise

    @functools.cached_property
    def _sample(self) -> str:
        pictures = b"".join(self.scene("test", number).picture.tobytes() for number in range(8))
        return hashlib.sha256(pictures).hexdigest()

    def data_revision(self) -> dict[str, str]:
        """The rule's version, and a hash over the fields and eight test pictures."""
        return revision_of(RULE, self, self._sample)
