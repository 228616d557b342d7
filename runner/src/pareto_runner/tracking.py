"""Writes results to MLflow: one parent run per suite, one child per result. Nothing else imports mlflow.

A result is known by the hash of its journal file, so that each is in a store once, whoever brings it and how often:

* Writers that can take turns do: all on this machine, and all that share a sqlite file. A run that was begun under the
  lock and not ended belongs to a writer that was killed; the next one deletes it.
* Writers on several machines cannot. Each looks again after writing, and of two whole runs of one result the same one
  stays, whoever looks.

A fresh sqlite store is made beside its place and moved there whole: MLflow cannot open one whose making was cut short.
MLflow is imported where it is needed, its telemetry off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pareto_core import ParetoError, Result
from pareto_core.cache import cache_directory
from pareto_runner.fields import metric_key, run_metrics, run_name, run_params, run_tags, table_view, tag_texts
from pareto_runner.journal import locked
from pareto_runner.sections import find_metric

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, Run
    from mlflow.tracking import MlflowClient

DEFAULT_URI = "sqlite:///mlflow.db"
CURVE = "train_loss"
#: key of the view of MLflow's table that :meth:`Tracker.log` stores with the experiment
VIEW = "pareto"
#: tags: identity of a result, identity of a suite, process of a suite, and lock under which a run was begun
ID, SUITE, PROCESS, LOCK = "pareto.id", "pareto.suite", "pareto.process", "pareto.lock"
#: runs that one request for identities covers
PAGE = 500
#: MLflow's names for what is wrong with a request rather than with the store
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INTERNAL_ERROR")


class TrackingError(ParetoError):
    """A tracking store that cannot be reached or written."""


class RefusedError(TrackingError):
    """A result that the store does not take, while it may take others."""


def tracking_uri(uri: str | None = None) -> str:
    """Return ``uri``, else ``$MLFLOW_TRACKING_URI``, else :data:`DEFAULT_URI`."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def disable_telemetry() -> None:
    """Turn off what MLflow would send home, and its notices, here and in processes started from here."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"


def ui_command(uri: str | None = None, port: int = 5000) -> list[str]:
    """Return the command that serves the store's MLflow UI on this machine alone.

    One worker and no background jobs are enough for one reader. Side effect: telemetry is off for the child too.
    """
    disable_telemetry()
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    store = tracking_uri(uri)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    artifacts = artifact_directory(store)
    places = ["--artifacts-destination", str(artifacts)] if artifacts else []
    return [*command, "--backend-store-uri", store, *places]


def artifact_directory(uri: str) -> Path | None:
    """``mlartifacts`` beside a sqlite file; None for every other store, which knows its own place."""
    path = sqlite_path(uri)
    return None if path is None else path.parent / "mlartifacts"


def sqlite_path(uri: str) -> Path | None:
    """Absolute path of the file behind a sqlite URI; None for other URIs."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix):
        return None
    return Path(uri.removeprefix(prefix).partition("?")[0]).absolute()


def shown(uri: str) -> str:
    """``uri`` as it may stand in a message: without a password."""
    return re.sub(r"(?<=://)[^/@]*@", "…@", uri)


def ui_page(experiment_id: str) -> str:
    """The part of a UI's address, from ``/`` on, that opens an experiment's results with the columns to choose by."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}"


def find_experiment(uri: str | None = None, experiment: str = "pareto") -> str | None:
    """Id of an experiment of a store, None where it has none of that name; creates no store."""
    store = tracking_uri(uri)
    path = sqlite_path(store)
    if path is not None and not path.exists():
        return None
    disable_telemetry()
    from mlflow.tracking import MlflowClient

    with store_lock(store):
        found = MlflowClient(tracking_uri=store).get_experiment_by_name(experiment)
    return None if found is None else str(found.experiment_id)


@contextlib.contextmanager
def store_lock(uri: str) -> Iterator[str]:
    """Hold the lock of a store, beside a sqlite file, else in the cache; gives the lock's own name.

    Two that are given the same name exclude each other. Where no lock can be had, the name is empty.
    """
    path = sqlite_path(uri)
    if path is None:
        place = cache_directory() / "locks" / f"{identity_of(uri.encode())}.lock"
    else:
        place = path.resolve().with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(place))
            name = place.read_text()
            if not name:
                name = uuid.uuid4().hex[:16]
                place.write_text(name)
        except OSError:
            if path is not None:
                raise
            name = ""  # a server keeps its own order; only what a killed writer left would stay
        yield name


def identity_of(content: bytes) -> str:
    """What a store knows a journal file by: 16 hexadecimal digits of the SHA-256 of its bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def create_sqlite(path: Path) -> None:
    """Make an empty store at ``path``, whole or not at all; the caller holds the store's lock."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = path.with_name(f".{path.name}.new")
    for left in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        left.unlink(missing_ok=True)
    SqlAlchemyStore(f"sqlite:///{unfinished}", (path.parent / "mlartifacts").as_uri()).engine.dispose()
    os.replace(unfinished, path)


@dataclasses.dataclass(frozen=True)
class Row:
    """A result as MLflow takes it. ``start`` and ``end`` (ms since 1970) are the run's own, not the upload's."""

    name: str
    status: str
    start: int
    end: int
    tags: dict[str, str]
    params: dict[str, str]
    #: value and step by name, in the order of logging
    metrics: tuple[tuple[str, float, int], ...]

    @classmethod
    def of(cls, result: Result) -> Self:
        """Translate a result."""
        start, end = period(result)
        curve = tuple((CURVE, loss, step) for step, loss in result.curve if math.isfinite(loss))
        return cls(
            name=run_name(result),
            status={"ok": "FINISHED", "failed": "FAILED"}.get(result.status, "KILLED"),
            start=start,
            end=end,
            tags=run_tags(result),
            params=run_params(result),
            metrics=tuple((name, value, 0) for name, value in run_metrics(result).items()) + curve,
        )

    def entities(self) -> tuple[list[Metric], list[Param]]:
        """Metrics and parameters as the client wants them."""
        from mlflow.entities import Metric, Param

        metrics = [Metric(name, value, self.start, step) for name, value, step in self.metrics]
        return metrics, [Param(name, value) for name, value in self.params.items()]


def period(result: Result) -> tuple[int, int]:
    """When a result was begun and ended, in milliseconds since 1970; now, where it does not say."""
    try:
        start = int(datetime.datetime.fromisoformat(result.context["time"]).timestamp() * 1000)
        return start, start + int(1000 * result.context.get("seconds", 0))
    except (KeyError, TypeError, ValueError, OverflowError):
        now = int(time.time() * 1000)
        return now, now


class Tracker:
    """Writes to one experiment of one store; as a context manager it ends what :meth:`suite` began.

    A suite ends ``FINISHED`` where all its results are ok, ``FAILED`` where one is not or an exception passed, and
    ``KILLED`` where the user interrupted it.
    """

    def __init__(self, uri: str | None = None, experiment: str = "pareto") -> None:
        self.uri = tracking_uri(uri)
        self.experiment = experiment
        self.experiment_id = ""
        self.parent_id: str | None = None
        self._client: MlflowClient | None = None
        self._suite: dict[str, Any] = {}
        self._failures = 0
        self._primary = ""

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.close_suite("KILLED" if interrupted else "FAILED" if kind else None)

    @property
    def client(self) -> MlflowClient:
        """The open client; raises TrackingError before :meth:`open`."""
        if self._client is None:
            raise TrackingError("use the tracker in a with statement: it is not open")
        return self._client

    def open(self) -> None:
        """Connect to the store, and make what it lacks; raises TrackingError."""
        disable_telemetry()
        import logging

        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        path = sqlite_path(self.uri)
        with self._errors("open"):
            if path is not None and path.is_dir():
                raise TrackingError(f"the tracking store {self.uri} names no file")
            with store_lock(self.uri):
                if path is not None and not path.exists():
                    create_sqlite(path)
                self._client = MlflowClient(tracking_uri=self.uri)
                self.experiment_id = self._find_or_create_experiment()

    def suite(
        self, name: str, tags: Mapping[str, str] | None = None, identity: str = "", process: str | None = None
    ) -> None:
        """Put the results to come under one parent run, which is made with the first of them; an open one is closed.

        A parent run that bears ``identity`` already is taken up again. ``process`` is whose suite it is
        (:func:`process_name`; None: this one).
        """
        self.close_suite()
        labels = {"pareto.kind": "suite", SUITE: identity or uuid.uuid4().hex[:16], PROCESS: process or process_name()}
        self._suite = {"run_name": name, "tags": tag_texts({**(tags or {}), **labels})}
        self._failures = 0

    def close_suite(self, status: str | None = None) -> None:
        """End the parent run, where one was made; ``status`` None says how its results ended."""
        with self._errors("close a suite in"):
            self.parent_id = self.parent_id or self._find_suite()
            if self.parent_id:
                self.client.set_terminated(self.parent_id, status or ("FAILED" if self._failures else "FINISHED"))
        self.parent_id, self._suite = None, {}

    def log(self, result: Result, content: bytes = b"") -> str:
        """Log one result as a child of the open suite, or alone without one; return the run's id.

        ``content`` is its journal file (empty: what that would hold). A result that the store has already is left as it
        is. Raises RefusedError where the store does not take this result, TrackingError where it takes none.
        """
        content = content or json.dumps(result.to_json(), indent=1, ensure_ascii=False, allow_nan=False).encode()
        name, row = identity_of(content), Row.of(result)
        with self._errors("log to"), store_lock(self.uri) as lock:
            run_id = self._settle(name, lock)
            if not run_id:
                run_id = self._write(row, content, {ID: name, LOCK: lock})
                if sqlite_path(self.uri) is None:
                    run_id = self._settle(name, lock) or run_id
                self._name_primary(result)
        self._failures += result.status == "failed"
        return run_id

    def present(self, page: str | None = None) -> tuple[set[str], str | None]:
        """Identities of whole results in the store, page by page: a page, and the name of the next or None."""
        with self._errors("read"):
            wanted = "tags.`pareto.kind` = 'result' and attributes.status != 'RUNNING'"
            found = self.client.search_runs([self.experiment_id], wanted, max_results=PAGE, page_token=page)
        return {run.data.tags[ID] for run in found if ID in run.data.tags}, found.token or None

    def end_abandoned(self) -> None:
        """Mark suites as ``KILLED`` that ended on this machine and could not say so."""
        with self._errors("tidy"), store_lock(self.uri) as lock:
            for run in self._search("tags.`pareto.kind` = 'suite' and attributes.status = 'RUNNING'"):
                if lock and run.data.tags.get(LOCK) == lock and not is_alive(run.data.tags.get(PROCESS, "")):
                    self.client.set_terminated(run.info.run_id, "KILLED")

    def _find_or_create_experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            artifacts = artifact_directory(self.uri)
            place = artifacts.as_uri() if artifacts else None
            # the kind makes the UI open on the table of runs, not on traces of language-model calls
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.client.create_experiment(self.experiment, place, tags))
        if found.lifecycle_stage == "deleted":
            raise TrackingError(f"experiment {self.experiment!r} in {shown(self.uri)} is deleted; choose another name")
        return str(found.experiment_id)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn what MLflow and its database raise into one message that names the store."""
        try:
            yield
        except ParetoError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            kind = RefusedError if is_refusal(error) else TrackingError
            raise kind(f"cannot {what} the tracking store {shown(self.uri)}: {lines[0]}") from error

    def _search(self, wanted: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment_id], wanted))

    def _find_suite(self) -> str | None:
        """Id of the parent run that the suite has in the store, None where it has none yet."""
        if not self._suite:
            return None
        found = self._search(f"tags.`{SUITE}` = '{self._suite['tags'][SUITE]}'")
        return found[0].info.run_id if found else None

    def _settle(self, name: str, lock: str) -> str:
        """Leave one whole run of a result, and none that was begun under this lock; the whole one's id, else empty."""
        found = sorted(self._search(f"tags.`{ID}` = '{name}'"), key=lambda run: run.info.run_id)
        whole = [run.info.run_id for run in found if run.info.status != "RUNNING"]
        ours = [run for run in found if lock and run.data.tags.get(LOCK) == lock]
        begun = [run.info.run_id for run in ours if run.info.status == "RUNNING"]
        for run_id in whole[1:] + begun:
            self.client.delete_run(run_id)
        return whole[0] if whole else ""

    def _write(self, row: Row, content: bytes, marks: Mapping[str, str]) -> str:
        """Write a row as a run of its own, which counts as whole once it has its final status."""
        if self._suite and self.parent_id is None:
            self.parent_id = self._find_suite() or self._create_suite(marks[LOCK])
        tags = {**row.tags, **marks, **({"mlflow.parentRunId": self.parent_id} if self.parent_id else {})}
        run_id = str(self.client.create_run(self.experiment_id, row.start, tags, row.name).info.run_id)
        try:
            self.client.log_batch(run_id, *row.entities())
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "result.json"
                path.write_bytes(content)
                self.client.log_artifact(run_id, str(path))
            self.client.set_terminated(run_id, row.status, row.end)
        except Exception as error:
            if is_refusal(error):
                self.client.delete_run(run_id)
            raise
        return run_id

    def _create_suite(self, lock: str) -> str:
        tags = {**self._suite["tags"], LOCK: lock}
        return str(self.client.create_run(self.experiment_id, None, tags, self._suite["run_name"]).info.run_id)

    def _name_primary(self, result: Result) -> None:
        """Tell the UI which figures to show first; the first result that has a score decides."""
        metric = metric_key(find_metric([result]))
        if not self._primary and metric in run_metrics(result):
            self._primary = metric
            set_tag = self.client.set_experiment_tag
            set_tag(self.experiment_id, "mlflow.experiment.primaryMetric.name", metric)
            set_tag(self.experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(table_view(result, metric)))


def is_refusal(error: Exception) -> bool:
    """Whether a store that works refused a request: another one may succeed, this one would not."""
    return getattr(error, "error_code", "") in REFUSALS


def process_name(pid: int | None = None) -> str:
    """Name of a process (None: this one) that no later one on this machine bears: its id and when it began."""
    pid = pid or os.getpid()
    began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{pid}-{began}"


def is_alive(name: str) -> bool:
    """Whether the process of that :func:`process_name` runs."""
    pid = name.partition("-")[0]
    with contextlib.suppress(OSError):
        return pid.isdigit() and process_name(int(pid)) == name
    return False
