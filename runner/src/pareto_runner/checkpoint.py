"""Checkpoints: after a kill, training goes on from the newest one as if nothing had happened.

A stage's folder holds one folder for each checkpoint, and mostly there is one: an older one goes when its successor is
whole. In it lie what the engine wrote, ``progress.pt`` (loss curve, seconds, best weights), ``random<rank>.pt`` (the
random generators of each process) and, written last, ``manifest.json``: the training that it belongs to, and size and
SHA-256 of every file. What its manifest does not confirm is discarded, and training starts over.

Files are read with ``weights_only``: tensors and plain values, never code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pareto_core import ConfigError, RunSpec, TrainingError
from pareto_core.cache import write_json
from pareto_runner.engines import Loop, distributed
from pareto_runner.phases import Phases

CHECKPOINT_SECONDS = 60.0
VARIABLE = "PARETO_CHECKPOINT_SECONDS"
#: the next checkpoint is due after so many times what the last one took, so that all of them take little of the time
PATIENCE = 10
MANIFEST = "manifest.json"


def seconds_between() -> float:
    """Seconds from one checkpoint to the next, as the environment says; raises ConfigError on what is no number."""
    given = os.environ.get(VARIABLE, str(CHECKPOINT_SECONDS))
    try:
        return float(given)
    except ValueError:
        raise ConfigError("environment", VARIABLE, given, "must be a number of seconds") from None


def identity_of(spec: RunSpec, stage: int, data: Mapping[str, str]) -> str:
    """Hash of what a checkpoint belongs to: the run, its stage and the training data; 16 hexadecimal digits."""
    parts = (spec.to_json(), stage, dict(data))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one stage in ``directory``: at most one in ``seconds``, of which the newest whole one is kept.

    With 0 seconds there is one after every step. ``identity`` is :func:`identity_of` the training. Writing and reading
    are the phase ``checkpoint`` of ``phases``, whose times and peaks of training are kept too. ``note`` is told what a
    user may want to know. ``keep_trained`` asks for one more at the end of training, since a later stage follows.
    """

    def __init__(
        self,
        directory: Path,
        identity: str,
        phases: Phases,
        note: Callable[[str], None] = lambda _: None,
        seconds: float = CHECKPOINT_SECONDS,
        keep_trained: bool = False,
    ) -> None:
        self._directory, self._identity, self._phases, self._note = directory, identity, phases, note
        self._seconds, self._keep_trained = seconds, keep_trained
        self._next = time.monotonic() + seconds
        self._rank = distributed()[0]
        self._failing = False

    def wanted(self, loop: Loop, last: bool) -> bool:
        """Whether a checkpoint is due after this step, the ``last`` or not; every process gets the same answer."""
        if last:
            return self._keep_trained
        return loop.anywhere(time.monotonic() >= self._next)

    def save(self, loop: Loop, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint after ``step``; where that fails, a note says why, and the one before stays.

        ``state`` holds tensors, numbers, texts, and lists and dicts of them; all processes call this together.
        """
        start = time.monotonic()
        folder = self._directory / f"step{step}"
        with self._phases("checkpoint"):
            whole = (
                self._done(loop, lambda: self._make(folder))
                and self._done(loop, lambda: self._write(loop, folder, state))
                and self._done(loop, lambda: self._confirm(folder))
            )
            self._failing = not whole
            if self._rank == 0:
                self._remove([other for other in self._folders() if other != folder] if whole else [folder])
        now = time.monotonic()
        self._next = now + max(self._seconds, PATIENCE * (now - start) if self._seconds else 0.0)

    def restore(self, loop: Loop) -> dict[str, Any] | None:
        """Put the engine back to the newest whole checkpoint; returns its state, None where there is none.

        The state has ``random`` besides what was saved: this process's generators, not put back yet. Raises
        TrainingError where a confirmed checkpoint does not fit; it is removed, so that the next start begins anew.
        """
        if not loop.anywhere(self._directory.is_dir()):
            return None
        with self._phases("checkpoint"):
            problems = {folder: damage(folder, self._identity) for folder in self._folders()}
            whole = [folder for folder, problem in problems.items() if not problem]
            if self._rank == 0:
                self._discard({folder: problem for folder, problem in problems.items() if problem})
            if loop.anywhere(not whole):
                return None
            try:
                state = self._read(loop, whole[-1])
            except Exception as error:
                self._remove(whole)
                raise TrainingError(
                    f"the checkpoint {whole[-1]} cannot be used and was removed; run again to start over: {error}"
                ) from error
            self._note(f"training goes on after {spoken(whole[-1])}")
        return state

    def forget(self) -> None:
        """Remove every checkpoint of the stage: training diverged, and would diverge again from any of them."""
        if self._rank == 0:
            self._remove(self._folders())

    def _make(self, folder: Path) -> None:
        if self._rank == 0:
            self._remove([folder])
            folder.mkdir(parents=True)

    def _write(self, loop: Loop, folder: Path, state: Mapping[str, Any]) -> None:
        import torch

        from pareto_runner.randomness import random_state

        loop.save(folder)
        torch.save(random_state(), folder / f"random{self._rank}.pt")
        if self._rank == 0:
            phases = self._phases.so_far("train", "checkpoint")
            torch.save({**state, "phases": phases}, folder / "progress.pt")

    def _confirm(self, folder: Path) -> None:
        if self._rank == 0:
            paths = sorted(folder.iterdir())
            for path in paths:
                flush(path)
            files = {path.name: fingerprint(path) for path in paths}
            write_json(folder / MANIFEST, {"identity": self._identity, "files": files})

    def _read(self, loop: Loop, folder: Path) -> dict[str, Any]:
        import torch

        loop.load(folder)
        state: dict[str, Any] = torch.load(folder / "progress.pt", map_location="cpu", weights_only=True)
        self._phases.go_on_from(state["phases"])
        random = torch.load(folder / f"random{self._rank}.pt", map_location="cpu", weights_only=True)
        return {**state, "random": random}

    def _done(self, loop: Loop, work: Callable[[], None]) -> bool:
        """Do ``work``; returns whether it went well in every process. The first of several failures is noted."""
        problem = ""
        try:
            work()
        except OSError as error:
            problem = str(error)
        except RuntimeError as error:
            problem = f"{str(error).splitlines()[0]} (PyTorch says so where the disk is full)"
        failed = loop.anywhere(bool(problem))
        if failed and not self._failing:
            self._note(f"no checkpoint was written: {problem or 'another process could not write its part'}")
        return not failed

    def _folders(self) -> list[Path]:
        """Folders of checkpoints by step, whole or not."""
        found = {}
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                match = re.fullmatch(r"step(\d+)", path.name)
                if match:
                    found[int(match[1])] = path
        return [found[step] for step in sorted(found)]

    def _discard(self, problems: Mapping[Path, str]) -> None:
        self._remove(list(problems))
        for folder, problem in problems.items():
            self._note(f"the checkpoint after {spoken(folder)} was discarded: {problem}")

    @staticmethod
    def _remove(folders: list[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def spoken(folder: Path) -> str:
    """Name of a checkpoint in a sentence: ``step 12``."""
    return folder.name.replace("step", "step ")


def damage(folder: Path, identity: str) -> str:
    """Say why a checkpoint cannot be used, empty where its manifest confirms every file."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["identity"] != identity:
            return "it belongs to another run"
        for name, expected in manifest["files"].items():
            if fingerprint(folder / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        name = Path(error.filename).name
        return "it was not finished" if name == MANIFEST else f"{name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return ""


def flush(path: Path) -> None:
    """Wait until a file has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fingerprint(path: Path) -> list[Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
