"""Results as JSON files, each written whole or not at all, before anything else sees them.

A file's name carries the order in which it was written, never a time, for clocks step back. A result whose journal
cannot be written (disk full, directory made read-only) is rescued into the cache or the temporary directory, and
:meth:`Journal.adopt` brings it home.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pareto_core import ParetoError, Result, RunSpec
from pareto_core.cache import cache_directory, write_json

NAME = re.compile(r"(\d{6,})-.*\.json")


class JournalError(ParetoError):
    """A result could be stored nowhere."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A result and the file that holds it; ``number`` grows with each one written."""

    path: Path
    number: int
    result: Result


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A file of the journal that is not a result, and why."""

    path: Path
    reason: str


class Journal:
    """A directory with one JSON file per result, named by its number, question, variant, seed, target and key."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, result: Result) -> Path:
        """Store ``result`` under the next number and return the file, which lies elsewhere where this directory fails.

        Raises JournalError where it could be stored nowhere.
        """
        problems = []
        for directory in (self.directory, *self._shelters()):
            try:
                return Journal(directory)._append(result)
            except OSError as error:
                problems.append(f"{directory}: {error.strerror or error}")
        raise JournalError(f"{name_of(result.spec)} could not be stored: {'; '.join(problems)}")

    def scan(self) -> tuple[list[Entry], list[Damaged]]:
        """Every result, in the order of writing, and the files that hold none."""
        found = list(self._scan())
        return [f for f in found if isinstance(f, Entry)], [f for f in found if isinstance(f, Damaged)]

    def entries(self) -> list[Entry]:
        """Every result, in the order of writing."""
        return self.scan()[0]

    def damaged(self) -> list[Damaged]:
        """The files that hold no result of this version."""
        return self.scan()[1]

    def read(self) -> list[Result]:
        """Every result, in the order of writing."""
        return [entry.result for entry in self.entries()]

    def set_aside(self) -> list[Damaged]:
        """Rename damaged files so that they are not met again, and return them as they were."""
        found = self.damaged()
        for item in found:
            os.replace(item.path, item.path.with_name(item.path.name + ".damaged"))
        return found

    def adopt(self) -> list[Path]:
        """Move results that were stored elsewhere into this directory, if it takes them; returns their new files."""
        adopted = []
        with contextlib.suppress(OSError):  # they stay where they are until the disk has room again
            for shelter in self._shelters():
                for entry in Journal(shelter).entries():
                    if entry.result not in self.read():  # an adoption that was cut short moved it already
                        adopted.append(self._append(entry.result))
                    entry.path.unlink()
        return adopted

    def _append(self, result: Result) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / ".lock"):
            number = 1 + max((_number(path) for path in self.directory.iterdir()), default=0)
            slug = re.sub(r"[^a-z0-9]+", "-", name_of(result.spec).lower()).strip("-")[:150]
            key = re.sub(r"[^0-9A-Za-z]+", "", result.key)[:64] or "nokey"
            path = self.directory / f"{number:06d}-{slug}-{key}.json"
            write_json(path, result.to_json())
        return path

    def _scan(self) -> Iterator[Entry | Damaged]:
        for path in sorted(self.directory.glob("*.json"), key=lambda path: (_number(path), path.name)):
            if not path.is_file():
                yield Damaged(path, "not a file")
                continue
            try:
                yield Entry(path, _number(path), Result.from_json(json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, RecursionError, ParetoError) as error:
                yield Damaged(path, f"not a result of this version: {str(error) or type(error).__name__}"[:300])
            except OSError as error:
                yield Damaged(path, f"cannot be read: {error.strerror}")

    def _shelters(self) -> Iterator[Path]:
        own = hashlib.sha256(os.fsencode(self.directory.absolute())).hexdigest()[:12]
        yield cache_directory() / "rescued" / own
        yield Path(tempfile.gettempdir()) / f"pareto-rescued-{os.getuid()}" / own


def _number(path: Path) -> int:
    match = NAME.fullmatch(path.name.removesuffix(".damaged"))
    return int(match[1]) if match else 0


def name_of(spec: RunSpec) -> str:
    """What a person calls a run: question, variant, seed and target."""
    return f"{spec.question} {spec.variant} {spec.seed} {spec.target}"


def content_key(spec: RunSpec, code: str, lock: str, data: Mapping[str, str], machine: Mapping[str, Any]) -> str:
    """Hash of all that decides a result; 16 hexadecimal digits. What has the same key need not run again."""
    parts = (spec.to_json(), code, lock, dict(data), dict(machine))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; it is free again when this process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def latest(results: Iterable[Result]) -> list[Result]:
    """Keep the last result of each question, variant, seed, target, profile and machine, as they first appeared."""
    kept: dict[tuple[str, ...], Result] = {}
    for result in results:
        spec = result.spec
        machine = json.dumps(result.machine, sort_keys=True)
        kept[spec.question, spec.variant, str(spec.seed), spec.target, spec.profile, machine] = result
    return list(kept.values())
