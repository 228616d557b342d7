"""Prepared models on disk, and what is left of runs that were cut short.

The rule: a checkpoint goes when its variant is prepared; a prepared model is kept for the next suite, which can then
measure it beside a new variant without training it again, until all of them exceed :data:`KEEP`: the oldest go first.
``pareto clean`` frees all of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pareto_core import ParetoError
from pareto_runner.run import Artifact

#: bytes of prepared models that a suite leaves behind
KEEP = 2 * 2**30


class Artifacts:
    """A directory with one folder per prepared variant, named by the key of its result."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def place(self, key: str) -> Path:
        """Folder of the variant with that key, which may hold a checkpoint to go on from."""
        place = self.directory / key
        place.mkdir(parents=True, exist_ok=True)
        return place

    def find(self, key: str) -> Artifact | None:
        """The prepared variant, None where it is not there whole."""
        try:
            return Artifact.read(self.directory / key)
        except (OSError, ValueError, ParetoError):
            return None

    def forget(self, key: str) -> None:
        """Remove a variant's folder."""
        shutil.rmtree(self.directory / key, ignore_errors=True)

    def trim(self, keep: int = KEEP) -> None:
        """Remove the oldest prepared variants until the rest fits into ``keep`` bytes."""
        folders = [path for path in self.directory.glob("*") if path.is_dir()]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for folder in folders:
            total += size_of(folder)
            if total > keep:
                shutil.rmtree(folder, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Bytes of all files under ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clean(directory: Path) -> int:
    """Remove prepared models, checkpoints and logs under a results directory, never its results; returns the bytes."""
    freed = 0
    for name in ("artifacts", "logs"):
        folder = directory / name
        if folder.is_dir():
            freed += size_of(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return freed
