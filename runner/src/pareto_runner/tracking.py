"""Logs results to MLflow: one parent run per suite, one child per result. Nothing else imports mlflow.

A store has one writer at a time: this class. A fresh sqlite store is migrated once, under a lock beside the file, since
several processes that migrate together break each other. MLflow is imported where it is needed, its telemetry off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pareto_core import ParetoError, Result
from pareto_runner.sections import find_metric

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

DEFAULT_URI = "sqlite:///mlflow.db"
#: measurements that stay in result.json: MLflow's tables are for what one compares
LEFT_OUT = {
    *("time_s.build", "time_s.finish", "finish_difference", "total_parameters", "idle_mib", "train_step_alone_ms"),
}
#: what one request to the store may hold
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_LENGTH = 6000
TAG_LENGTH = 5000
CURVE = "train_loss"
#: key of the view of MLflow's table that :meth:`Tracker.log` stores with the experiment
VIEW = "pareto"


class TrackingError(ParetoError):
    """A tracking store that cannot be reached or written."""


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

    with _migration_lock(path):
        found = MlflowClient(tracking_uri=store).get_experiment_by_name(experiment)
    return None if found is None else str(found.experiment_id)


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
        self._failures = 0
        self._primary = ""

    def __enter__(self) -> Self:
        with self._errors("open"):
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.close_suite("KILLED" if interrupted else "FAILED" if kind or self._failures else "FINISHED")

    @property
    def client(self) -> MlflowClient:
        """The open client; raises TrackingError before :meth:`__enter__`."""
        if self._client is None:
            raise TrackingError("use the tracker in a with statement: it is not open")
        return self._client

    def suite(self, name: str, tags: Mapping[str, str] | None = None) -> str:
        """Open the parent run of the results to come and return its id; an open one is closed before."""
        self.close_suite("FAILED" if self._failures else "FINISHED")
        with self._errors("open a suite in"):
            run = self.client.create_run(
                self.experiment_id, run_name=name, tags={"pareto.kind": "suite", **_texts(tags or {})}
            )
        self.parent_id, self._failures = run.info.run_id, 0
        return self.parent_id

    def close_suite(self, status: str = "FINISHED") -> None:
        """End the parent run, where one is open."""
        if self.parent_id is None:
            return
        with self._errors("close a suite in"):
            self.client.set_terminated(self.parent_id, status)
        self.parent_id = None

    def log(self, result: Result) -> str:
        """Log one result as a child of the open suite, or alone without one; return the run's id."""
        from mlflow.entities import Param, RunTag

        with self._errors("log to"):
            name = run_name(result)
            tags = {**run_tags(result), **({"mlflow.parentRunId": self.parent_id} if self.parent_id else {})}
            run_id = self.client.create_run(self.experiment_id, run_name=name).info.run_id
            metrics = self._metrics(result)
            first, rest = (
                metrics[: METRICS_PER_BATCH - 2 * PARAMS_PER_BATCH],
                metrics[METRICS_PER_BATCH - 2 * PARAMS_PER_BATCH :],
            )
            params = [Param(key, value) for key, value in run_params(result).items()][:PARAMS_PER_BATCH]
            labels = [RunTag(key, value) for key, value in tags.items()][:PARAMS_PER_BATCH]
            self.client.log_batch(run_id, first, params, labels)
            for start in range(0, len(rest), METRICS_PER_BATCH):
                self.client.log_batch(run_id, rest[start : start + METRICS_PER_BATCH])
            self._log_json(run_id, result)
            self.client.set_terminated(run_id, {"ok": "FINISHED", "failed": "FAILED"}.get(result.status, "KILLED"))
            self._name_primary(result)
        self._failures += result.status == "failed"
        return str(run_id)

    def _open(self) -> None:
        disable_telemetry()
        import logging

        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        with _migration_lock(sqlite_path(self.uri)):
            self._client = MlflowClient(tracking_uri=self.uri)
            found = self._client.get_experiment_by_name(self.experiment)
            if found is None:
                artifacts = artifact_directory(self.uri)
                place = artifacts.as_uri() if artifacts else None
                # the kind makes the UI open on the table of runs, not on traces of language-model calls
                tags = {"mlflow.experimentKind": "custom_model_development"}
                self.experiment_id = self._client.create_experiment(self.experiment, place, tags)
            elif found.lifecycle_stage == "deleted":
                raise TrackingError(f"experiment {self.experiment!r} in {self.uri} is deleted; choose another name")
            else:
                self.experiment_id = found.experiment_id

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn what MLflow and its database raise into one message that names the store."""
        try:
            yield
        except ParetoError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise TrackingError(f"cannot {what} the tracking store {self.uri}: {lines[0]}") from error

    def _metrics(self, result: Result) -> list[Metric]:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, value, now, 0) for name, value in run_metrics(result).items()]
        return values + [Metric(CURVE, loss, now, step) for step, loss in result.curve if math.isfinite(loss)]

    def _log_json(self, run_id: str, result: Result) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "result.json"
            path.write_text(json.dumps(result.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
            self.client.log_artifact(run_id, str(path))

    def _name_primary(self, result: Result) -> None:
        """Tell the UI which figures to show first; the first result that has a score decides."""
        metric = _key(find_metric([result]))
        if not self._primary and metric in run_metrics(result):
            self._primary = metric
            set_tag = self.client.set_experiment_tag
            set_tag(self.experiment_id, "mlflow.experiment.primaryMetric.name", metric)
            set_tag(self.experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(table_view(result, metric)))


def table_view(result: Result, metric: str) -> dict[str, Any]:
    """What MLflow's table of runs shows under the key :data:`VIEW`: results only, and the columns to choose by."""
    costs = [name for name in run_metrics(result) if name.startswith(("latency_ms.", "next_token_ms."))][:2]
    names = [metric, "trainable_parameters", *costs, "ratio.latency_ms.batch1", "train_step_ms", "ratio.train_step_ms"]
    names += ["train_peak_mib", "inference_peak_mib"]
    columns = [f"metrics.`{name}`" for name in names] + [f"params.`{name}`" for name in ("profile", "task", "seed")]
    filters = {"searchFilter": "tags.`pareto.kind` = 'result'", "startTime": "ALL", "lifecycleFilter": "Active"}
    # by score, since in order of time MLflow folds the results away under their suites
    order = {"orderByKey": f"metrics.`{metric}`", "orderByAsc": False}
    return {**filters, **order, "datasetsFilter": [], "modelVersionFilter": "All Runs", "selectedColumns": columns}


def run_name(result: Result) -> str:
    """``KronA (24, 16) · seed 0 · xeon``."""
    spec = result.spec
    return f"{spec.variant} · seed {spec.seed} · {spec.target}"


def run_metrics(result: Result) -> dict[str, float]:
    """The figures to compare by; what a compiler computed has ``compiled.`` before its name."""
    metrics = {}
    for item in sorted(result.measurements, key=lambda item: item.name != result.metric):
        if item.name not in LEFT_OUT:
            metrics[_key(item.name if item.kind == "measured" else f"compiled.{item.name}")] = item.value
    for ratio in result.comparisons:
        if ratio.baseline == result.spec.baseline and not ratio.name.startswith("control."):
            metrics[_key(f"ratio.{ratio.name}")] = ratio.ratio
    return {name: _round(value) for name, value in metrics.items() if math.isfinite(value)}


def run_params(result: Result) -> dict[str, str]:
    """What was run: the specification, flat, with each method's and the task's own fields."""
    spec = result.spec
    params: dict[str, Any] = {
        "variant": spec.variant,
        "question": spec.question,
        "profile": spec.profile,
        "task": spec.task.name,
        "target": spec.target,
        "engine": spec.engine.name,
        "precision": spec.engine.precision or "target's default",
        "seed": spec.seed,
        "methods": " → ".join(" + ".join(method.name for method in stage.methods) for stage in spec.stages),
    }
    params |= {f"engine.{name}": getattr(spec.engine, name) for name in ("zero_stage", "processes")}
    params |= {f"{_last(spec.task.name)}.{name}": value for name, value in spec.task.fields.items()}
    for number, stage in enumerate(spec.stages, 1):
        prefix = "" if len(spec.stages) == 1 else f"stage{number}."
        training = stage.training.to_json()
        budget = {name: value for name, value in training.pop("budget").items() if value is not None}
        params |= {f"{prefix}{name}": value for name, value in {**training, **budget}.items()}
        for method in stage.methods:
            params |= {f"{prefix}{_last(method.name)}.{name}": value for name, value in method.fields.items()}
    return {_key(name): _text(value, PARAM_LENGTH) for name, value in params.items()}


def run_tags(result: Result) -> dict[str, str]:
    """Where it ran, from which code, what it reproduces, and how it ended."""
    machine, context, paper = result.machine, result.context, result.paper
    kinds = {item.kind for item in result.measurements}
    tags = {
        "pareto.kind": "result",
        "kind": "compiled" if "compiled" in kinds else "measured" if kinds else "none",
        "status": result.status,
        "reason": result.reason,
        "question": result.spec.question,
        "target": result.spec.target,
        "cpu": machine.get("cpu"),
        "gpu": machine.get("gpu"),
        "commit": context.get("commit"),
        "dirty": context.get("dirty"),
        "baseline": result.spec.baseline,
        "paper": paper.get("title"),
        "paper_url": paper.get("url"),
        "table": paper.get("table"),
        "mlflow.source.git.commit": context.get("commit"),
        "mlflow.source.name": "pareto bench",
        "mlflow.note.content": note(result),
    }
    return _texts({name: value for name, value in tags.items() if value not in (None, "")})


def note(result: Result) -> str:
    """The run's description in the UI: a few lines of Markdown."""
    spec = result.spec
    lines = [f"**{spec.variant}** on {spec.task.name}, seed {spec.seed}, {spec.profile} profile."]
    if result.status != "ok":
        return f"{lines[0]}\n\n{result.status}: {result.reason}"
    shown = [name for name in run_metrics(result) if not name.startswith(("ratio.", "time_s"))]
    units = {item.name: item.unit for item in result.measurements}
    lines += ["", "| | |", "|---|--:|"]
    lines += [f"| {name} | {run_metrics(result)[name]:,.4g} {units.get(name, '')} |" for name in shown]
    for ratio in result.comparisons:
        interval = f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        lines.append(f"| {ratio.name} against {ratio.baseline} | × {interval}, {ratio.verdict} |")
    return "\n".join(lines)


@contextlib.contextmanager
def _migration_lock(path: Path | None) -> Iterator[None]:
    """Let one process at a time create and migrate the database at ``path``."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _round(value: float) -> float:
    """Six digits, for MLflow's table shows all that there are; counts stay exact, and so does result.json."""
    return float(value) if value == int(value) else float(f"{value:.6g}")


def _last(name: str) -> str:
    """``krona`` of ``adapters.krona``."""
    return name.rpartition(".")[2]


def _key(name: str) -> str:
    """Replace what MLflow refuses in a key."""
    text = "".join(c if c.isascii() and (c.isalnum() or c in "_-. ") else "_" for c in name)[:250]
    return text.strip(". ") or "_"


def _text(value: Any, length: int) -> str:
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float, str)) for item in value):
        text = f"({', '.join(map(str, value))})"  # as JSON, the UI would spread it over lines
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 1] + "…"


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value, TAG_LENGTH) for name, value in values.items()}
