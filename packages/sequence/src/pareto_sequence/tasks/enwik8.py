"""EnWik8: the first 10⁸ bytes of an English Wikipedia dump, predicted byte by byte (§7.4.1, table 7.1).

M. Hutter, "The Human Knowledge Compression Contest", 2006, http://prize.hutter1.net. The first 90 million bytes train,
five million each are dev and test. A character is a byte: bits per character are bits per byte. The text is cut into
chunks of 2,048 bytes, of which a training window has 2, 3 or 4 (one number for a whole batch); dev and test are read in
windows of 3 chunks of 4,096.

Deviation: a token is a byte (256 of them), where MEGA's vocabulary lists the 204 that occur, and windows of dev and
test overlap by one byte (:mod:`pareto_sequence.tasks.language`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from pareto_core.errors import DataError
from pareto_core.task import Metric, Split, TaskSpec
from pareto_sequence.tasks.files import Published
from pareto_sequence.tasks.language import LanguageModelling

ENWIK8 = Published(
    "EnWik8", "PARETO_ENWIK8_DIR", ("enwik8",), ("enwik8",), "http://mattmahoney.net/dc/enwik8.zip (100,000,000 bytes)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Enwik8(LanguageModelling):
    """Bits per character of the published file ``enwik8`` in ``data``, else in ``$PARETO_ENWIK8_DIR``.

    ``chunk_size`` and ``evaluation_chunk_size`` are the chunks' sizes in bytes, ``chunks`` how many a training window
    may have, ``evaluation_chunks`` how many one of dev and test has.
    """

    name: ClassVar[str] = "sequence.enwik8"
    metric: ClassVar[Metric] = Metric("bits_per_character", unit="bits", higher_is_better=False)
    units: ClassVar[Mapping[str, str]] = {"bits_per_character": "bits"}

    data: str | None = None
    train_bytes: int = 90_000_000
    dev_bytes: int = 5_000_000
    test_bytes: int = 5_000_000
    chunk_size: int = 2048
    chunks: tuple[int, ...] = (2, 3, 4)
    evaluation_chunk_size: int = 4096
    evaluation_chunks: int = 3

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        for field in ("train_bytes", "dev_bytes", "test_bytes", "chunk_size", "evaluation_chunk_size"):
            self.require(field, getattr(self, field) >= 2, "must be at least 2")
        self.require("evaluation_chunks", self.evaluation_chunks > 0, "must be above 0")
        self.require("chunks", bool(self.chunks) and min(self.chunks) > 0, "must be one or more numbers above 0")
        longest = self.chunk_size * max(self.chunks)
        self.require("train_bytes", self.train_bytes >= longest, f"must be at least {longest}, the longest window")

    @property
    def train_lengths(self) -> tuple[int, ...]:
        """Bytes of a training window: a number of chunks times their size."""
        return tuple(self.chunk_size * count for count in sorted(self.chunks))

    @property
    def window_length(self) -> int:
        """Bytes of a window of dev and test: 3 × 4,096."""
        return self.evaluation_chunks * self.evaluation_chunk_size

    @property
    def spec(self) -> TaskSpec:
        """The 256 bytes, and the longest window."""
        return TaskSpec((), 256, max(self.window_length, *self.train_lengths), generates=True)

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        path = ENWIK8.find(self.data) / "enwik8"
        if not path.is_file():
            raise DataError(f"EnWik8: {path} is not a file")
        size, needed = path.stat().st_size, self.train_bytes + self.dev_bytes + self.test_bytes
        if size < needed:
            raise DataError(f"EnWik8: {path} has {size} bytes; the splits take {needed}: the file is cut or not enwik8")
        return np.memmap(path, np.uint8, "r")

    def text(self, split: Split) -> np.ndarray:
        """Bytes (length,) of ``split``, read from the file where they are used."""
        start = {"train": 0, "dev": self.train_bytes, "test": self.train_bytes + self.dev_bytes}[split]
        length = {"train": self.train_bytes, "dev": self.dev_bytes, "test": self.test_bytes}[split]
        return self._bytes[start : start + length]

    @functools.cached_property
    def _hash(self) -> str:
        used = self._bytes[: self.train_bytes + self.dev_bytes + self.test_bytes]
        return hashlib.sha256(used.data).hexdigest()

    def data_revision(self) -> dict[str, str]:
        """Hash of the bytes that are used, and where they are split."""
        return {"sha256": self._hash, "splits": f"{self.train_bytes}/{self.dev_bytes}/{self.test_bytes}"}
