"""Text, Retrieval and Image of the Long Range Arena, from their published files (table 7.3).

Y. Tay, M. Dehghani, S. Abnar, Y. Shen, D. Bahri, P. Pham, J. Rao, L. Yang, S. Ruder, D. Metzler, "Long Range Arena: A
Benchmark for Efficient Transformers", 2021, https://arxiv.org/abs/2011.04006. Nothing is downloaded: the files lie in a
directory that ``data``, else ``$PARETO_LRA_DIR``, names. Byte b is token b + 1, token 0 pads.

Where no development split is published (Text, Image), a tenth of the training items, drawn by ``seed``, is kept out of
training as one. The Long Range Arena selects on the test set of Text instead; results say which, by their revision.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, overload

import numpy as np

from pareto_core.errors import DataError
from pareto_core.task import Split, TaskSpec
from pareto_sequence.tasks.base import Inputs, Items, SequenceClassification, held_out
from pareto_sequence.tasks.files import Published

VARIABLE = "PARETO_LRA_DIR"
DEV_SHARE = 0.1
IMDB = Published(
    "LRA Text (IMDB)",
    VARIABLE,
    ("aclImdb",),
    ("train/neg", "train/pos", "test/neg", "test/pos"),
    "https://ai.stanford.edu/~amaas/data/sentiment/ (aclImdb_v1.tar.gz)",
)
AAN = Published(
    "LRA Retrieval (AAN)",
    VARIABLE,
    ("tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data"),
    tuple(f"new_aan_pairs.{part}.tsv" for part in ("train", "eval", "test")),
    "https://github.com/google-research/long-range-arena (lra_release.gz)",
)
CIFAR = Published(
    "LRA Image (CIFAR-10)",
    VARIABLE,
    ("cifar-10-batches-bin",),
    (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
    "https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)",
)
#: CIFAR-10's classes in the order of their numbers
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
#: weights of red, green and blue in the brightness of a pixel (ITU-R BT.601), as the Long Range Arena has them
LUMA = np.array([0.2989, 0.5870, 0.1140])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LraText(SequenceClassification):
    """Is a film review good or bad? Its bytes, cut at ``max_length``: 4,096 in MEGA and in chapter 7, 1,000 to 4,000 in
    the Long Range Arena.
    """

    name: ClassVar[str] = "sequence.lra_text"

    data: str | None = None
    max_length: int = 4096
    seed: int = 0

    def validate(self) -> None:
        """Check ranges."""
        self.require("max_length", self.max_length > 0, "must be above 0")
        self.require("seed", self.seed >= 0, "must not be negative")

    @property
    def spec(self) -> TaskSpec:
        """Two classes, 256 bytes and the padding."""
        return TaskSpec(("negative", "positive"), 257, self.max_length)

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
        root = IMDB.find(self.data)
        return {part: _reviews(root / part) for part in ("train", "test")}

    def read(self, split: Split) -> Items:
        """Reviews of ``split``: negative ones first, each kind by file name."""
        texts, labels = self._parts["test" if split == "test" else "train"]
        chosen = np.arange(len(labels))
        if split != "test":
            train, dev = held_out(len(labels), DEV_SHARE, self.seed)
            chosen = train if split == "train" else dev
        rows = [_tokens(texts[i], self.max_length) for i in chosen]
        return Items(rows, labels[chosen], np.array([len(row) for row in rows]))

    def data_revision(self) -> dict[str, str]:
        """Hash over all reviews, and the seed that draws the dev split."""
        digest = hashlib.sha256()
        for part in ("train", "test"):
            texts, labels = self._parts[part]
            for text, label in zip(texts, labels, strict=True):
                digest.update(f"{part} {label} {len(text)}\n".encode() + text.tobytes())
        return {"sha256": digest.hexdigest(), "dev": f"a tenth of train by seed {self.seed}"}


def _reviews(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    texts, labels = [], []
    for label, kind in enumerate(("neg", "pos")):
        paths = sorted((folder / kind).glob("*.txt"))
        if not paths:
            raise DataError(f"{IMDB.title}: {folder / kind} has no .txt files")
        for path in paths:
            text = path.read_bytes()
            if not text:
                raise DataError(f"{IMDB.title}: {path} is empty")
            texts.append(np.frombuffer(text, np.uint8))
            labels.append(label)
    return texts, np.array(labels)


def _tokens(text: np.ndarray, length: int) -> np.ndarray:
    """Tokens of the first ``length`` bytes."""
    return text[:length].astype(np.int16) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LraRetrieval(SequenceClassification):
    """Do two papers cite each other? The bytes of both, each cut at ``max_length``."""

    name: ClassVar[str] = "sequence.lra_retrieval"
    inputs: ClassVar[Inputs] = "pairs"

    data: str | None = None
    max_length: int = 4000

    def validate(self) -> None:
        """Check ranges."""
        self.require("max_length", self.max_length > 0, "must be above 0")

    @property
    def spec(self) -> TaskSpec:
        """Two classes, 256 bytes and the padding."""
        return TaskSpec(("unrelated", "citing"), 257, self.max_length)

    def _path(self, split: Split) -> Path:
        part = {"train": "train", "dev": "eval", "test": "test"}[split]
        return AAN.find(self.data) / f"new_aan_pairs.{part}.tsv"

    def read(self, split: Split) -> Items:
        """Pairs of ``split`` in the order of the file, which is read where they are used."""
        path = self._path(split)
        labels, places = _index(path)
        if not len(labels):
            raise DataError(f"{AAN.title}: {path} has no lines")
        first, second = (_Texts(path, places[:, i : i + 2], self.max_length) for i in (0, 2))
        lengths = np.minimum(np.maximum(places[:, 1], places[:, 3]), self.max_length)
        return Items(first, labels, lengths, second)

    @functools.cached_property
    def _hash(self) -> str:
        digest = hashlib.sha256()
        splits: tuple[Split, ...] = ("train", "dev", "test")
        for split in splits:
            with self._path(split).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def data_revision(self) -> dict[str, str]:
        """Hash over the three files."""
        return {"sha256": self._hash}


class _Texts(Sequence[np.ndarray]):
    """Tokens of texts that lie in a file, at ``places`` (number, 2): start and length in bytes."""

    def __init__(self, path: Path, places: np.ndarray, max_length: int) -> None:
        self._bytes, self._places, self._max_length = np.memmap(path, np.uint8, "r"), places, max_length

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, number: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, number: slice) -> list[np.ndarray]: ...

    def __getitem__(self, number: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        start, length = self._places[number].tolist()
        return _tokens(self._bytes[start : start + length], self._max_length)


def _index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (lines,), and where both texts of each line start and how long they are (lines, 4).

    A line is label, two ids and two texts, separated by tabs; raises :class:`DataError` naming the line otherwise.
    """
    labels, places, start = [], [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            where = f"{AAN.title}: {path}, line {number}"
            if len(fields) != 5:
                raise DataError(f"{where}: {len(fields)} columns, expected label, two ids and two texts")
            if fields[0] not in (b"0", b"1", b"0.0", b"1.0"):
                raise DataError(f"{where}: label {fields[0][:20]!r}, expected 0 or 1")
            if not fields[3] or not fields[4]:
                raise DataError(f"{where}: an empty text")
            labels.append(int(fields[0][:1]))
            first = start + sum(map(len, fields[:3])) + 3
            places.append((first, len(fields[3]), first + len(fields[3]) + 1, len(fields[4])))
            start += len(line)
    return np.array(labels, np.int64), np.array(places, np.int64).reshape(-1, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LraImage(SequenceClassification):
    """CIFAR-10 in shades of grey, row by row: 1,024 values in [0, 1]. Read from the set's binary version."""

    name: ClassVar[str] = "sequence.lra_image"
    inputs: ClassVar[Inputs] = "values"

    data: str | None = None
    seed: int = 0

    def validate(self) -> None:
        """Check ranges."""
        self.require("seed", self.seed >= 0, "must not be negative")

    @property
    def spec(self) -> TaskSpec:
        """Ten classes, 1,024 positions."""
        return TaskSpec(OBJECTS, 0, SIDE * SIDE)

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        root = CIFAR.find(self.data)
        train = [_images(root / name) for name in CIFAR.needed[:-1]]
        return {
            "train": (np.concatenate([p[0] for p in train]), np.concatenate([p[1] for p in train])),
            "test": _images(root / CIFAR.needed[-1]),
        }

    def read(self, split: Split) -> Items:
        """Images of ``split`` in the order of the files."""
        images, labels = self._parts["test" if split == "test" else "train"]
        if split != "test":
            train, dev = held_out(len(labels), DEV_SHARE, self.seed)
            chosen = train if split == "train" else dev
            images, labels = images[chosen], labels[chosen]
        return Items(images, labels, np.full(len(labels), SIDE * SIDE), scale=1 / 255)

    def data_revision(self) -> dict[str, str]:
        """Hash over all grey images and labels, and the seed that draws the dev split."""
        digest = hashlib.sha256()
        for part in ("train", "test"):
            for array in self._parts[part]:
                digest.update(array.tobytes())
        return {"sha256": digest.hexdigest(), "dev": f"a tenth of train by seed {self.seed}"}


def _images(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey images (number, 1024) of bytes, and their classes, of a file of records: a class, then three planes."""
    size = 1 + 3 * SIDE * SIDE
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % size:
        raise DataError(f"{CIFAR.title}: {path} has {len(content)} bytes, not a multiple of {size} above 0")
    records = content.reshape(-1, size)
    if records[:, 0].max() >= len(OBJECTS):
        raise DataError(f"{CIFAR.title}: {path} has the class {records[:, 0].max()}, expected 0 to 9")
    planes = records[:, 1:].reshape(-1, 3, SIDE * SIDE)
    return np.rint(np.einsum("ncp,c->np", planes, LUMA)).astype(np.uint8), records[:, 0].astype(np.int64)
