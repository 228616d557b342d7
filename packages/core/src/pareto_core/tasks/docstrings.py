"""Classify a CPython docstring by the library module that it documents: real text that is on every machine.

The corpus is read from the running interpreter's own library with ``ast`` (nothing is imported): the docstrings of
modules, classes and functions, labelled with their top-level module; the 20 most frequent modules are the classes. It
differs between Python versions, so its sha256 is part of every result, and accuracies over different hashes are not
compared. Docstrings that are copies of each other but for a few words stay in one split.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pareto_core.cache import cache_directory, write_json
from pareto_core.errors import DataError
from pareto_core.task import Metric, Split
from pareto_core.tasks.classification import Example, TextClassification

CLASSES = 20
MIN_CHARACTERS = 30
#: word triples that two docstrings must share, of those that either has, to count as near-duplicates
DUPLICATE_JACCARD = 0.5
EXCLUDED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


@dataclasses.dataclass(frozen=True)
class Docstring:
    """A docstring with its top-level module and where it stands (``module.Class.function``)."""

    module: str
    place: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Docstrings(TextClassification):
    """The 20 most documented modules of the standard library, on the MiniLM encoder.

    ``data`` may name another directory of Python sources (default: the running interpreter's library).
    """

    name: ClassVar[str] = "core.docstrings"
    metric: ClassVar[Metric] = Metric("accuracy")

    max_length: int = 64

    @functools.cached_property
    def _corpus(self) -> list[Docstring]:
        return read_corpus(Path(self.data) if self.data else Path(sysconfig.get_path("stdlib")))

    @functools.cached_property
    def _labels(self) -> tuple[str, ...]:
        counts = collections.Counter(doc.module for doc in self._corpus)
        if len(counts) < 2:
            raise DataError(f"the docstrings under {self.data or 'the library'} come from fewer than two modules")
        return tuple(sorted(sorted(counts, key=lambda m: (-counts[m], m))[:CLASSES]))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes: module names."""
        return self._labels

    @functools.cached_property
    def _by_split(self) -> dict[Split, list[Example]]:
        kept = [doc for doc in self._corpus if doc.module in self.labels]
        found: dict[Split, list[Example]] = {"train": [], "dev": [], "test": []}
        seen: collections.Counter[str] = collections.Counter()
        for doc, group in zip(kept, group_duplicates([doc.text for doc in kept]), strict=True):
            seen[doc.place] += 1
            name = doc.place if seen[doc.place] == 1 else f"{doc.place}#{seen[doc.place]}"
            found[split_of(kept[group].text)].append(Example(name, (doc.text,), doc.module))
        return found

    def examples(self, split: Split) -> list[Example]:
        """Docstrings of ``split``, in the order of their places."""
        return self._by_split[split]

    def data_revision(self) -> dict[str, str]:
        """The corpus's sha256 beside the Python version that it belongs to."""
        digest = hashlib.sha256(json.dumps([dataclasses.astuple(d) for d in self._corpus]).encode()).hexdigest()
        return {"sha256": digest, "python": platform.python_version(), "backbone": self.model}


def split_of(text: str) -> Split:
    """Assign a text to ``train`` (70 %), ``dev`` (10 %) or ``test`` (20 %) by its hash."""
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "train" if point < 0.7 else "dev" if point < 0.8 else "test"


def read_corpus(root: Path) -> list[Docstring]:
    """Read every docstring of at least 30 characters under ``root``, sorted by place; cached until a file changes.

    Raises :class:`DataError` where there is none.
    """
    files = [path for path in sorted(root.rglob("*.py")) if not EXCLUDED & set(path.relative_to(root).parts)]
    state = "".join(f"{p.relative_to(root)} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in files)
    key = hashlib.sha256((platform.python_version() + str(root) + state).encode()).hexdigest()[:16]
    path = cache_directory() / "docstrings" / f"{key}.json"
    if path.is_file():
        try:
            return [Docstring(*row) for row in json.loads(path.read_text())]
        except (ValueError, TypeError):
            path.unlink()
    found = sorted((doc for file in files for doc in _docstrings(file, root)), key=lambda d: (d.place, d.text))
    if not found:
        raise DataError(f"no docstrings of {MIN_CHARACTERS} characters or more in the Python files under {root}")
    write_json(path, [dataclasses.astuple(doc) for doc in found])
    return found


def _docstrings(path: Path, root: Path) -> Iterator[Docstring]:
    parts = path.relative_to(root).with_suffix("").parts
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    module = ".".join(parts).removesuffix(".__init__")
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    while pending:
        place, node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARACTERS:
                yield Docstring(parts[0], place, text)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                name = getattr(child, "name", None)
                pending.append((f"{place}.{name}" if name else place, child))


def group_duplicates(texts: list[str]) -> list[int]:
    """Give each text the number of the first text that it is a near-duplicate of, chains included.

    Two texts are near-duplicates when the Jaccard index of their word triples is at least 0.5. Triples that more than
    50 texts share say little and only nominate no candidates; they count in the index.
    """
    shingles = [_shingles(text) for text in texts]
    holders: dict[str, list[int]] = collections.defaultdict(list)
    for number, words in enumerate(shingles):
        for shingle in words:
            holders[shingle].append(number)
    parent = list(range(len(texts)))

    def find(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for number, words in enumerate(shingles):
        candidates = {other for s in words if len(holders[s]) <= 50 for other in holders[s] if other < number}
        if all(len(holders[s]) > 50 for s in words):
            candidates = {holders[s][0] for s in words} - {number}
        for other in candidates:
            shared = len(words & shingles[other])
            if shared >= DUPLICATE_JACCARD * (len(words) + len(shingles[other]) - shared):
                low, high = sorted((find(number), find(other)))
                parent[high] = low
    return [find(number) for number in range(len(texts))]


def _shingles(text: str) -> frozenset[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    if len(words) < 3:
        return frozenset([" ".join(words) or text])
    return frozenset(" ".join(words[i : i + 3]) for i in range(len(words) - 2))
