"""Handwritten digits of 8 × 8 pixels as sequences of 64 values: real data that come with scikit-learn.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", 1998, https://doi.org/10.24432/C50P49, its test
part of 1,797 images, as ``sklearn.datasets.load_digits`` carries it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import ClassVar

import numpy as np

from pareto_core.errors import DataError
from pareto_core.task import Split, TaskSpec
from pareto_sequence.tasks.base import Inputs, Items, SequenceClassification, held_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(SequenceClassification):
    """The ten digits, row by row, in [0, 1]; ``seed`` draws a tenth of the images as dev and a fifth as test."""

    name: ClassVar[str] = "sequence.digits"
    inputs: ClassVar[Inputs] = "values"

    seed: int = 0

    def validate(self) -> None:
        """Check ranges."""
        self.require("seed", self.seed >= 0, "must not be negative")

    @property
    def spec(self) -> TaskSpec:
        """Ten classes, 64 positions."""
        return TaskSpec(tuple("0123456789"), 0, 64)

    @functools.cached_property
    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                f'task {self.name} needs scikit-learn, which has the images: pip install "pareto-sequence[digits]"'
            ) from error
        images, labels = load_digits(return_X_y=True)
        return images.astype(np.uint8), labels.astype(np.int64)

    def read(self, split: Split) -> Items:
        """Images of ``split`` in the order of the set."""
        images, labels = self._images
        rest, test = held_out(len(labels), 0.2, self.seed)
        train, dev = (rest[part] for part in held_out(len(rest), 0.125, self.seed))
        chosen = {"train": train, "dev": dev, "test": test}[split]
        return Items(images[chosen], labels[chosen], np.full(len(chosen), 64), scale=1 / 16)

    def data_revision(self) -> dict[str, str]:
        """Hash of images and labels; the seed that splits them is a field."""
        images, labels = self._images
        return {"sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(), "seed": str(self.seed)}
