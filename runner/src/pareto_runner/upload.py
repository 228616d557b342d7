"""Brings results from the journal into MLflow, by a child process: no fault of a store reaches what waits for it.

The child imports MLflow, reads commands as JSON lines and answers each; the parent gives it a limit, and ends it when
that has passed. When the parent is killed, the child marks the suite as such and ends too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pareto_core import ParetoError, Result
from pareto_runner.isolate import Child, ChildError, environment, say
from pareto_runner.tracking import (
    RefusedError,
    Tracker,
    TrackingError,
    identity_of,
    process_name,
    shown,
    tracking_uri,
)

#: seconds in which the child must answer; its first answer includes MLflow's import and, once, the making of a store
LIMIT = 60.0
#: seconds after which the end of a suite begins no further attempt to bring in what is behind
LAST_ATTEMPT = 120.0
#: a server that does not answer is given up within half a minute, not after MLflow's eight minutes
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
#: refusals in a row after which they are the store's fault, not the results'
REFUSALS = 3


class StoreError(ParetoError):
    """A store that takes nothing now; the message names it and says why."""


class ItemError(ParetoError):
    """A journal file that did not come in, while others may; ``damaged`` where it holds no result."""

    def __init__(self, message: str, damaged: bool) -> None:
        super().__init__(message)
        self.damaged = damaged


class Store:
    """The child that writes to a store: started when it is asked something, and anew after it had to be ended."""

    def __init__(self, uri: str | None, logs: Path, limit: float = LIMIT) -> None:
        self._uri, self._logs, self._limit = tracking_uri(uri), logs, limit
        self._child: Child | None = None
        self._suite: dict[str, Any] = {}
        self._refusals = 0

    @property
    def running(self) -> bool:
        """Whether there is a child."""
        return self._child is not None

    def suite(self, name: str, tags: Mapping[str, str]) -> None:
        """Put what is logged from here on under a parent run, which is made with the first result that is new."""
        identity = uuid.uuid4().hex[:16]
        self._suite = {"name": name, "tags": dict(tags), "identity": identity, "process": process_name()}
        self.close()

    def log(self, path: Path) -> None:
        """Bring in a journal file, unless it is there; raises StoreError, or ItemError where only this one fails."""
        self._ask(do="log", path=str(path.absolute()))
        self._refusals = 0

    def present(self) -> set[str]:
        """Identities of the results that the store has; raises StoreError."""
        found: set[str] = set()
        page = None
        while True:
            answer = self._ask(do="present", page=page)
            found.update(answer["ids"])
            page = answer["page"]
            if page is None:
                return found

    def tidy(self) -> None:
        """Mark suites that were killed with their writer; raises StoreError."""
        self._ask(do="tidy")

    def end_suite(self, status: str) -> None:
        """End the parent run, where one was made, with one of MLflow's statuses; raises StoreError."""
        self._ask(do="close", status=status)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(self, **command: Any) -> dict[str, Any]:
        try:
            if self._child is None:
                self._child = self._start()
                if self._suite:
                    self._child.ask(do="suite", **self._suite)
            return self._child.ask(**command)
        except ChildError as error:
            self._refusals += error.kind == "refused"
            item = error.kind == "damaged" or (error.kind == "refused" and self._refusals < REFUSALS)
            if item and command["do"] == "log":
                raise ItemError(str(error), error.kind == "damaged") from error
            self.close()
            raise StoreError(self._explain(error)) from error
        except BaseException:
            self.close()  # interrupted: what it still answers would be taken for the next answer
            raise

    def _start(self) -> Child:
        # the address may hold a password, which a command line would show to everybody
        variables = {**PATIENCE, **environment(), "MLFLOW_TRACKING_URI": self._uri}
        command = [sys.executable, "-m", "pareto_runner.upload"]
        with contextlib.suppress(ChildError):
            return Child(command, self._logs / "upload.log", variables, self._limit)
        return Child(command, Path(os.devnull), variables, self._limit)  # results can go in where no log can be written

    def _explain(self, error: ChildError) -> str:
        if error.kind in ("store", "refused"):
            return str(error)
        said = f"writing to the tracking store {shown(self._uri)}: {error}"
        last = "".join(error.log.splitlines()[-1:])
        return f"{said} ({last})" if last and last[:200] not in said else said


class Uploader:
    """Brings a suite's results into MLflow as they come; no fault of the store is raised here.

    After the store has failed, nothing is tried until the end, so that a dead one costs a bounded time in all.
    """

    def __init__(self, uri: str | None, logs: Path, limit: float = LIMIT) -> None:
        self._store = Store(uri, logs, limit)
        #: why something is behind; empty where nothing is
        self.problem = ""
        #: journal files that are not known to be in the store
        self.behind: list[Path] = []
        self._failed = self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.close("KILLED" if interrupted else "FAILED" if kind else "FINISHED")

    def suite(self, name: str, tags: Mapping[str, str] | None = None) -> None:
        """Name the parent run of the results to come; it is made with the first one that the store has not yet."""
        self._store.suite(name, tags or {})

    def log(self, path: Path) -> None:
        """Bring in the result of a journal file; nothing of it goes on when this returns."""
        self.behind.append(path)
        if not self._failed:
            self._bring(path)

    def close(self, status: str = "FINISHED") -> None:
        """Try once more to bring in what is behind, then end the parent run; a second call does nothing.

        ``status`` is one of MLflow's: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if self._closed:
            return
        self._closed, self._failed = True, False
        try:
            deadline = time.monotonic() + LAST_ATTEMPT
            for path in list(self.behind):
                if not self._failed and time.monotonic() < deadline:
                    self._bring(path)
            if not self.behind:
                self.problem = ""
            if self._store.running:
                self._store.end_suite(status)
        except StoreError as error:
            self._note(error)
        finally:
            self._store.close()

    def _bring(self, path: Path) -> None:
        try:
            self._store.log(path)
            self.behind.remove(path)
        except ItemError as error:
            self._note(error)
        except StoreError as error:
            self._failed = True
            self._note(error)

    def _note(self, error: ParetoError) -> None:
        self.problem = self.problem or str(error)


@dataclasses.dataclass
class Summary:
    """What an upload did: how many results are new in the store, how many were there, and why others are not."""

    uploaded: int = 0
    present: int = 0
    failed: dict[Path, str] = dataclasses.field(default_factory=dict)
    damaged: dict[Path, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.uploaded} brought in, {self.present} there already"]
        if self.failed:
            lines[0] += f", {len(self.failed)} not brought in"
            lines += dict.fromkeys(self.failed.values())
        lines += [f"left out: {path} is {reason}" for path, reason in self.damaged.items()]
        return "\n".join(lines)


def upload_journal(
    directory: Path, uri: str | None = None, on_item: Callable[[str], None] = lambda _: None, limit: float = LIMIT
) -> Summary:
    """Bring in what a journal directory holds and the store does not, under a parent run of its own.

    ``on_item`` is told of each file. Where the store fails, the rest is left, with its message.
    """
    summary = Summary()
    waiting: dict[Path, str] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            waiting[path] = identity_of(path.read_bytes())
        except OSError as error:
            summary.damaged[path] = f"cannot be read: {error.strerror}"
    if not waiting:
        return summary
    with tempfile.TemporaryDirectory() as logs, contextlib.closing(Store(uri, Path(logs), limit)) as store:
        folder = directory.absolute()
        name = folder.parent.name if folder.name == "journal" else folder.name
        store.suite(f"{name} · uploaded later", {"journal": str(folder)})
        try:
            _bring_in(store, waiting, summary, on_item)
        except StoreError as error:
            summary.failed |= dict.fromkeys(waiting, str(error))
    return summary


def _bring_in(store: Store, waiting: dict[Path, str], summary: Summary, on_item: Callable[[str], None]) -> None:
    """Bring in the files of ``waiting`` (by their identities) one by one; each is taken out when it is settled."""
    on_item("asking the store what it has")
    store.tidy()
    known = store.present()
    total = len(waiting)
    for number, (path, identity) in enumerate(list(waiting.items()), 1):
        on_item(f"{number} of {total}: {path.name}")
        if identity in known:
            summary.present += 1
        else:
            try:
                store.log(path)
                known.add(identity)
                summary.uploaded += 1
            except ItemError as error:
                (summary.damaged if error.damaged else summary.failed)[path] = str(error)
        del waiting[path]
    with contextlib.suppress(StoreError):  # all results are in; the next upload marks the suite
        store.end_suite("FINISHED")


class DamagedError(ParetoError):
    """A journal file that holds no result."""


def read(path: Path) -> tuple[Result, bytes]:
    """A journal file's result, and its bytes; raises DamagedError."""
    try:
        content = path.read_bytes()
        return Result.from_json(json.loads(content)), content
    except OSError as error:
        raise DamagedError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, ParetoError) as error:
        raise DamagedError(f"not a result of this version: {error or type(error).__name__}"[:300]) from error


def commands() -> Iterator[dict[str, Any]]:
    """Yield the parent's commands until it ends; what is still at work then ends too, at the latest after the limit."""
    arrived: queue.SimpleQueue[str] = queue.SimpleQueue()

    def follow() -> None:
        for line in sys.stdin:
            arrived.put(line)
        arrived.put("")
        time.sleep(LIMIT)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    while line := arrived.get():
        yield json.loads(line)


def carry_out(tracker: Tracker, command: Mapping[str, Any]) -> dict[str, Any]:
    """Do what the parent asked for and return the answer; one that only concerns this command is an error in it."""
    try:
        match command["do"]:
            case "suite":
                tracker.suite(command["name"], command["tags"], command["identity"], command["process"])
            case "log":
                tracker.log(*read(Path(command["path"])))
            case "present":
                found, page = tracker.present(command["page"])
                return {"ids": sorted(found), "page": page}
            case "tidy":
                tracker.end_abandoned()
            case "close":
                tracker.close_suite(command["status"])
        return {}
    except DamagedError as error:
        return {"error": str(error), "kind": "damaged"}
    except TrackingError as error:
        return {"error": str(error), "kind": "refused" if isinstance(error, RefusedError) else "store"}
    except Exception as error:  # nobody foresaw it, so it is told of this command alone
        traceback.print_exception(error)
        return {"error": f"{type(error).__name__}: {error}", "kind": "refused"}


def main() -> int:
    """Entry point of the child: JSON lines from standard input to the store that ``$MLFLOW_TRACKING_URI`` names."""
    tracker = Tracker()
    try:
        tracker.open()
    except TrackingError as error:
        say({"error": str(error), "kind": "store"})
        return 1
    for command in commands():
        say(carry_out(tracker, command))
    with contextlib.suppress(TrackingError):
        tracker.close_suite("KILLED")  # the parent ended without saying how the suite ended
    return 0


if __name__ == "__main__":
    sys.exit(main())
