"""What MLflow shows of a result: name, figures, parameters, tags and description. Knows nothing of MLflow itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pareto_core import Result

#: measurements that stay in result.json: MLflow's tables are for what one compares
LEFT_OUT = {
    *("time_s.build", "time_s.finish", "finish_difference", "total_parameters", "idle_mib", "train_step_alone_ms"),
}
PARAM_LENGTH = 6000
TAG_LENGTH = 5000
#: characters of a log that a tag shows; result.json has it all
LOG_LENGTH = 1000


def table_view(result: Result, metric: str) -> dict[str, Any]:
    """The view of MLflow's table of runs that shows results only, and the columns to choose by."""
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
    """The figures to compare by; what a compiler computed has ``compiled.`` before its name.

    Ratios and differences are those to the baseline; their intervals are in result.json and in :func:`note`.
    """
    metrics = {}
    for item in sorted(result.measurements, key=lambda item: item.name != result.metric):
        if item.name not in LEFT_OUT:
            metrics[metric_key(item.name if item.kind == "measured" else f"compiled.{item.name}")] = item.value
    for ratio in result.comparisons:
        if ratio.baseline == result.spec.baseline and not ratio.name.startswith("control."):
            metrics[metric_key(f"ratio.{ratio.name}")] = ratio.ratio
    for gap in result.differences:
        if gap.baseline == result.spec.baseline:
            metrics[metric_key(f"difference.{gap.name}")] = gap.difference
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
    return {metric_key(name): _text(value, PARAM_LENGTH) for name, value in params.items()}


def run_tags(result: Result) -> dict[str, str]:
    """Where it ran, from which code, what it reproduces, and how it ended."""
    machine, context, paper = result.machine, result.context, result.paper
    kinds = {item.kind for item in result.measurements}
    margins = [ratio.margin for ratio in result.comparisons if ratio.baseline == result.spec.baseline]
    tags = {
        "pareto.kind": "result",
        "pareto.key": result.key,
        "kind": "compiled" if "compiled" in kinds else "measured" if kinds else "none",
        "status": result.status,
        "reason": result.reason,
        "log": result.log[-LOG_LENGTH:],
        "question": result.spec.question,
        "target": result.spec.target,
        "cpu": machine.get("cpu"),
        "gpu": machine.get("gpu"),
        "commit": context.get("commit"),
        "dirty": context.get("dirty"),
        "baseline": result.spec.baseline,
        "margin": _round(max(margins, default=0.0)) or None,
        "paper": paper.get("title"),
        "paper_url": paper.get("url"),
        "table": paper.get("table"),
        "mlflow.source.git.commit": context.get("commit"),
        "mlflow.source.name": "pareto bench",
        "mlflow.note.content": note(result),
    }
    return tag_texts({name: value for name, value in tags.items() if value not in (None, "")})


def note(result: Result) -> str:
    """The run's description in the UI: a few lines of Markdown."""
    spec = result.spec
    lines = [f"**{spec.variant}** on {spec.task.name}, seed {spec.seed}, {spec.profile} profile."]
    if result.status != "ok":
        log = f"\n\n```\n{result.log[-LOG_LENGTH:]}\n```" if result.log else ""
        return f"{lines[0]}\n\n{result.status}: {result.reason}{log}"
    metrics = run_metrics(result)
    shown = [name for name in metrics if not name.startswith(("ratio.", "difference.", "time_s"))]
    units = {item.name: item.unit for item in result.measurements}
    lines += ["", "| | |", "|---|--:|"]
    lines += [f"| {name} | {metrics[name]:,.4g} {units.get(name, '')} |" for name in shown]
    for ratio in result.comparisons:
        interval = f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        lines.append(f"| {ratio.name} against {ratio.baseline} | × {interval}, {ratio.verdict} |")
    for gap in result.differences:
        interval = f"{gap.difference:+.3g} [{gap.low:+.3g}, {gap.high:+.3g}] {units.get(gap.name, '')}".rstrip()
        lines.append(f"| {gap.name} against {gap.baseline} | {interval}, {gap.verdict} |")
    return "\n".join(lines)


def metric_key(name: str) -> str:
    """Replace what MLflow refuses in the name of a metric or parameter."""
    text = "".join(c if c.isascii() and (c.isalnum() or c in "_-. ") else "_" for c in name)[:250]
    return text.strip(". ") or "_"


def tag_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as tags: text, cut to what a store takes."""
    return {name: _text(value, TAG_LENGTH) for name, value in values.items()}


def _round(value: float) -> float:
    """Six digits, for MLflow's table shows all that there are; counts stay exact, and so does result.json."""
    return float(value) if value == int(value) else float(f"{value:.6g}")


def _last(name: str) -> str:
    """``krona`` of ``adapters.krona``."""
    return name.rpartition(".")[2]


def _text(value: Any, length: int) -> str:
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float, str)) for item in value):
        text = f"({', '.join(map(str, value))})"  # as JSON, the UI would spread it over lines
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 1] + "…"
