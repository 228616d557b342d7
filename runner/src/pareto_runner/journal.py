"""Results as JSON files, written whole or not at all, before anything else sees them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from pareto_core import ParetoError, Result
from pareto_core.cache import write_json


class Journal:
    """A directory with one JSON file per result, named by its question, variant, seed and key."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, result: Result) -> Path:
        """Store ``result``; an earlier one with the same key is replaced."""
        spec = result.spec
        words = f"{spec.question}-{spec.variant}-{spec.seed}-{spec.target}"
        slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
        path = self.directory / f"{slug}-{key(result)}.json"
        write_json(path, result.to_json())
        return path

    def read(self) -> list[Result]:
        """Return every result, oldest first; raises ParetoError naming a file that is not one."""
        results = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                results.append(Result.from_json(json.loads(path.read_text())))
            except (ValueError, ParetoError) as error:
                raise ParetoError(f"{path} is not a result of this version: {error}") from error
        return sorted(results, key=lambda r: str(r.context.get("time", "")))


def key(result: Result) -> str:
    """Hash of what decides a result: specification, code, data and machine; 12 hexadecimal digits."""
    parts = (result.spec.to_json(), result.context.get("code"), result.data, result.machine)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def latest(results: Iterable[Result]) -> list[Result]:
    """Keep the newest result of each question, variant, seed and target, in the order of first appearance."""
    kept: dict[tuple[str, str, int, str, str], Result] = {}
    for result in results:
        spec = result.spec
        kept[spec.question, spec.variant, spec.seed, spec.target, spec.profile] = result
    return list(kept.values())
