"""What a suite has to run, and why: a result whose specification, code, lock, data and machine are the same stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pareto_core import ParetoError, Result, RunSpec
from pareto_runner.discover import make_task
from pareto_runner.journal import Entry, content_key
from pareto_runner.machine import code_hash, lock_hash, machine, packages_of


@dataclasses.dataclass(frozen=True)
class Planned:
    """A specification, the key of its result, the result that stands for it (None: it runs), and why.

    ``seconds`` is what it took the last time, None where it never ended well.
    """

    spec: RunSpec
    key: str
    standing: Entry | None
    why: str
    seconds: float | None

    @property
    def place(self) -> str:
        """Name of the folder of what it prepares: the key, or the specification's hash where no key could be made."""
        return self.key or f"nokey-{self.spec.digest()}"


class Past:
    """What a journal holds, looked up by key and by name."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._by_key: dict[str, Entry] = {}
        self._by_name: dict[tuple[str, ...], Result] = {}
        self._seconds: dict[tuple[str, ...], float] = {}
        self._revisions: dict[str, dict[str, str]] = {}
        for entry in entries:
            result = entry.result
            self._by_name[_name(result.spec)] = result
            if result.status == "ok":
                seconds = result.context.get("seconds")
                if isinstance(seconds, float):
                    self._seconds[_name(result.spec)] = seconds
                if result.key:
                    self._by_key[result.key] = entry

    def plan(self, specs: Sequence[RunSpec], fresh: bool = False) -> list[Planned]:
        """Decide for each specification whether it runs; ``fresh`` lets no earlier result stand."""
        return [self._decide(spec, fresh) for spec in specs]

    def _decide(self, spec: RunSpec, fresh: bool) -> Planned:
        facts = self._decisive(spec)
        key = content_key(spec, **facts) if facts else ""
        standing = None if fresh else self._by_key.get(key) if key else None
        why = "unchanged" if standing else "asked for afresh" if fresh else self._reason(spec, facts)
        return Planned(spec, key, standing, why, self._seconds.get(_name(spec)))

    def _reason(self, spec: RunSpec, facts: Mapping[str, Any]) -> str:
        last = self._by_name.get(_name(spec))
        if last is None:
            return "not run yet"
        if last.status != "ok":
            return f"last time {last.status}: {last.reason.splitlines()[0]}"
        changed = [
            name
            for name, before, now in (
                ("specification", last.spec.to_json(), spec.to_json()),
                ("code", last.context.get("code"), facts.get("code")),
                ("lock", last.context.get("lock"), facts.get("lock")),
                ("data", last.data, facts.get("data")),
                ("machine", last.machine, facts.get("machine")),
            )
            if before != now
        ]
        return f"changed: {', '.join(changed)}" if changed else "the last result does not stand"

    def _decisive(self, spec: RunSpec) -> dict[str, Any]:
        """All that decides a result besides its specification; empty where the data cannot be read."""
        task = spec.task.canonical()
        if task not in self._revisions:
            try:
                self._revisions[task] = make_task(spec.task).data_revision()
            except (ParetoError, OSError, ImportError):
                return {}  # the run itself will say what is missing
        data = self._revisions[task]
        return {"code": code_hash(packages_of(spec)), "lock": lock_hash(), "data": data, "machine": machine()}


def _name(spec: RunSpec) -> tuple[str, ...]:
    return spec.question, spec.variant, str(spec.seed), spec.target, spec.profile
