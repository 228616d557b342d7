"""The checks: what the instruments report of the workloads, held against what those themselves saw.

The workloads go through the runner as any variant does: a process that prepares, then a worker that takes turns. The
naive sampler is put through the same checks, which shows that they can fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pareto_core import Engine, MethodSpec, ParetoError, Result, RunSpec, Stage, TaskRef
from pareto_core.cache import write_json
from pareto_core.spec import Budget, Training
from pareto_runner.discover import make_target
from pareto_runner.isolate import Child, binding, environment, worker_command
from pareto_runner.run import Artifact, prepare
from pareto_runner.selftest.device import DEVICE
from pareto_runner.selftest.diary import Facts, Truth
from pareto_runner.selftest.naive import NaiveSampler
from pareto_runner.selftest.work import REQUESTS, STEPS, WORK, Workload
from pareto_runner.selftest.workload import TRAINING_STEPS
from pareto_runner.turns import Crew

#: seconds without a word after which a process of the self-test counts as hung
SILENCE = 120.0
#: largest errors: of times and rates relative, of memory in MiB
TIMES, MEMORY = 0.05, 2.0
TARGETS: dict[Workload, str] = {"host": "xeon", "device": "selftest", "cuda": "gpu", "compute": "xeon"}
#: requests that are timed beside other busy processes too
LOADED = ("sleep1", "sleep10", "sleep100")
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(100_000): pass"

#: truth and report, by the check's key
Readings = dict[str, tuple[float, float]]
Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a check asks: ``limit`` is the largest error, in ``unit``, or relative where ``relative``."""

    key: str
    kind: str
    name: str
    unit: str
    limit: float
    relative: bool = True


BOUNDS = (
    Bound("latency.sleep1", "latency", "1 ms asleep", "ms", TIMES),
    Bound("latency.sleep10", "latency", "10 ms asleep", "ms", TIMES),
    Bound("latency.sleep100", "latency", "100 ms asleep", "ms", TIMES),
    Bound("latency.spin10", "latency", "10 ms busy", "ms", TIMES),
    Bound("step.train", "latency", "training step", "ms", TIMES),
    Bound("loaded.sleep1", "latency beside two busy processes", "1 ms asleep", "ms", TIMES),
    Bound("loaded.sleep10", "latency beside two busy processes", "10 ms asleep", "ms", TIMES),
    Bound("loaded.sleep100", "latency beside two busy processes", "100 ms asleep", "ms", TIMES),
    Bound("first.tokens", "tokens", "first token", "ms", TIMES),
    Bound("next.tokens", "tokens", "next token, one by one", "ms", TIMES),
    Bound("first.bursts", "tokens", "first token before bursts", "ms", TIMES),
    Bound("next.bursts", "tokens", "next token, in bursts of four", "ms", TIMES),
    Bound("throughput.items8", "throughput", "inference, eight items a call", "items/s", TIMES),
    Bound("throughput.training", "throughput", "training", "items/s", TIMES),
    Bound("peak.train", "host memory", "training, with a spike of 20 ms", "MiB", MEMORY, False),
    Bound("peak.evaluate", "host memory", "evaluation, with spikes of 20 ms", "MiB", MEMORY, False),
    Bound("peak.load", "host memory", "loading, with a spike of 20 ms", "MiB", MEMORY, False),
    Bound("peak.inference", "host memory", "inference, with spikes of 20 ms", "MiB", MEMORY, False),
    Bound("latency.kernel", "asynchronous device", "a call that returns before it is done", "ms", TIMES),
    Bound("first.stream", "asynchronous device", "first token, said before it is made", "ms", TIMES),
    Bound("next.stream", "asynchronous device", "next token, said before it is made", "ms", TIMES),
    Bound("time.evaluate", "asynchronous device", "evaluation", "ms", TIMES),
    Bound("peak.device", "device memory", "the pretended device", "MiB", 0.0, False),
    Bound("peak.cuda", "device memory", "CUDA's allocator", "MiB", 0.0, False),
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One report held against the truth; ``naive`` is the same for the naive sampler.

    Each holds (truth, report), or None where nothing was measured, and ``skipped`` says why.
    """

    bound: Bound
    real: tuple[float, float] | None
    naive: tuple[float, float] | None
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """Whether the instruments kept the bound; a check that was skipped breaks nothing."""
        return self.real is None or self.error(self.real) <= self.bound.limit

    @property
    def naive_ok(self) -> bool:
        """Whether the naive sampler kept the bound."""
        return self.naive is None or self.error(self.naive) <= self.bound.limit

    def error(self, reading: tuple[float, float]) -> float:
        """Distance of report and truth, as the bound counts it."""
        truth, report = reading
        return abs(report - truth) / (truth if self.bound.relative else 1.0)

    def shown_error(self, reading: tuple[float, float]) -> str:
        """The error in words: in percent, or in the bound's unit."""
        error = self.error(reading)
        return f"{error:.1%}" if self.bound.relative else f"{error:.2f}"

    def to_json(self) -> dict[str, Any]:
        """All fields, and both verdicts."""
        return {**dataclasses.asdict(self), "ok": self.ok, "naive_ok": self.naive_ok}


def run_checks(directory: Path, seconds: float = 1.0, notify: Notify = lambda _: None) -> list[Check]:
    """Put instruments and naive sampler to the test; ``seconds`` is what each request may be sampled for.

    Files go to ``directory``, which is emptied. Raises ParetoError where a workload does not get through the runner.
    """
    shutil.rmtree(directory, ignore_errors=True)
    notify("the instruments, on the processor")
    real = _instruments_on_host(directory / "host", seconds)
    notify("the naive sampler, on the processor")
    naive = _naive_on_host(directory / "host")
    notify("both, on an asynchronous device")
    real |= _instruments_on_device(directory / "device", seconds)
    naive |= _naive_on_device(directory / "device")
    cuda = make_target(TARGETS["cuda"]).probe()
    if cuda.available:
        notify("both, on CUDA")
        real |= _instruments_on_cuda(directory / "cuda", seconds)
        naive |= _naive_on_cuda(directory / "cuda")
    skipped = {} if cuda.available else {"peak.cuda": cuda.reason}
    return [Check(b, real.get(b.key), naive.get(b.key), skipped.get(b.key, "")) for b in BOUNDS]


def make_spec(workload: Workload, directory: Path, seconds: float, **changes: Any) -> RunSpec:
    """A run of a workload that keeps its diaries under ``directory``; ``changes`` are fields of the specification."""
    method = MethodSpec(name="selftest.workload", fields={"log": str(directory / "diaries")})
    training = Training(batch_size=STEPS["train"].batch_size, budget=Budget(max_steps=TRAINING_STEPS))
    values: dict[str, Any] = {
        "question": "selftest",
        "variant": workload,
        "stages": (Stage(methods=(method,), training=training),),
        "task": TaskRef(name="selftest.workload", fields={"workload": workload}),
        "target": TARGETS[workload],
        "engine": Engine(name="torch", precision="fp32"),
        "measure_seconds": seconds,
    }
    return RunSpec(**{**values, **changes})


def _instruments_on_host(directory: Path, seconds: float) -> Readings:
    facts = Facts(directory / "diaries")
    result = _prepare_in_child(make_spec("host", directory, seconds), directory).result
    idle, report = result.value("idle_mib") or 0.0, _report(result)
    report |= {key: idle + report[key] for key in ("peak.train", "peak.evaluate")}
    readings = _pair(_preparation_truth(facts.read()), report)
    with Crew([Artifact.read(directory)], SILENCE) as crew:
        crew.load()
        for name in REQUESTS["host"]:
            crew.time_request(name)
        (result,) = crew.results()
        readings |= _pair(_host_truth(facts.read(_counts(result))), _report(result))
        with competing_load():
            for name in LOADED:
                crew.time_request(name)
        (result,) = crew.results()
        readings |= _loaded(facts.read(_counts(result)), _report(result))
        crew.start_training()
        crew.time_training()
        (result,) = crew.results()
        return readings | _pair(_step_truth(facts.read(_counts(result))), _report(result))


def _naive_on_host(directory: Path) -> Readings:
    artifact, facts = Artifact.read(directory), Facts(directory / "diaries")
    facts.read()  # what the instruments saw is not what this sampler sees
    sampler = NaiveSampler(artifact)
    report = sampler.training() | sampler.evaluation() | sampler.requests(tuple(REQUESTS["host"]))
    truth = facts.read()
    readings = _pair(_preparation_truth(truth) | _step_truth(truth) | _host_truth(truth), report)
    sampler = NaiveSampler(artifact)
    with competing_load():
        report = sampler.requests(LOADED)
    return readings | _loaded(facts.read(), report)


def _instruments_on_device(directory: Path, seconds: float) -> Readings:
    facts = Facts(directory / "diaries")
    artifact = prepare(make_spec("device", directory, seconds), directory)
    readings = _pair(_evaluation_truth(facts.read()), _report(artifact.result))
    result = _timed(artifact)
    report = _report(result)
    truth = facts.read(_counts(result))
    return readings | _pair(_device_truth(truth), report | {"peak.device": report["peak.inference"]})


def _naive_on_device(directory: Path) -> Readings:
    artifact, facts = Artifact.read(directory), Facts(directory / "diaries")
    facts.read()
    sampler = NaiveSampler(artifact)
    report = sampler.requests(tuple(REQUESTS["device"])) | sampler.evaluation()
    DEVICE.synchronize()  # the sampler did not wait for the end of what it timed
    truth = facts.read()
    report["peak.device"] = report["peak.inference"]
    return _pair(_device_truth(truth) | _evaluation_truth(truth), report)


def _instruments_on_cuda(directory: Path, seconds: float) -> Readings:
    facts = Facts(directory / "diaries")
    artifact = prepare(make_spec("cuda", directory, seconds), directory)
    facts.read()
    report = _report(_timed(artifact))
    return {"peak.cuda": (facts.read().peak_mib("block"), report["peak.inference"])}


def _naive_on_cuda(directory: Path) -> Readings:
    artifact, facts = Artifact.read(directory), Facts(directory / "diaries")
    facts.read()
    report = NaiveSampler(artifact, "cuda").requests(tuple(REQUESTS["cuda"]))
    return {"peak.cuda": (facts.read().peak_mib("block"), report["peak.inference"])}


def _preparation_truth(truth: Truth) -> dict[str, float]:
    """What training and evaluation used, and how fast training went."""
    items = STEPS["train"].batch_size * truth.count("train")
    return {
        "peak.train": truth.peak_mib("train"),
        "peak.evaluate": truth.peak_mib("evaluate"),
        "throughput.training": items / truth.total_seconds("train"),
    }


def _step_truth(truth: Truth) -> dict[str, float]:
    return {"step.train": truth.latency_ms("train")}


def _host_truth(truth: Truth) -> dict[str, float]:
    """What the requests to the processor took."""
    return {
        **{f"latency.{name}": truth.latency_ms(name) for name in (*LOADED, "spin10")},
        **_token_truth(truth, "tokens"),
        **_token_truth(truth, "bursts"),
        "throughput.items8": truth.items_per_second("items8", WORK["items8"].batch_size),
        "peak.load": truth.peak_mib("load", above="born"),
        "peak.inference": truth.peak_mib("spikes", above="born"),
    }


def _device_truth(truth: Truth) -> dict[str, float]:
    """What the requests to the pretended device took."""
    return {
        "latency.kernel": truth.latency_ms("kernel"),
        **_token_truth(truth, "stream"),
        "peak.device": truth.peak_mib("kernel"),
    }


def _token_truth(truth: Truth, name: str) -> dict[str, float]:
    return {f"first.{name}": truth.first_token_ms(name), f"next.{name}": truth.next_token_ms(name)}


def _evaluation_truth(truth: Truth) -> dict[str, float]:
    return {"time.evaluate": 1000 * truth.total_seconds("evaluate")}


def _loaded(truth: Truth, report: Mapping[str, float]) -> Readings:
    """Readings of the latencies that were taken under load."""
    return {f"loaded.{name}": (truth.latency_ms(name), report[f"latency.{name}"]) for name in LOADED}


def _pair(truth: Mapping[str, float], report: Mapping[str, float]) -> Readings:
    """Put beside each truth what was reported of it; a report that is missing is a KeyError."""
    return {key: (value, report[key]) for key, value in truth.items()}


def _report(result: Result) -> dict[str, float]:
    """The measurements of a result by the checks' keys; raises ParetoError where it did not end well."""
    if result.status != "ok":
        raise ParetoError(f"self-test, {result.spec.variant}: {result.reason}\n{result.log}".rstrip())
    values = {item.name: item.value for item in result.measurements}
    report = {name.removesuffix("_peak_mib"): value for name, value in values.items() if name.endswith("_peak_mib")}
    report = {f"peak.{name}": value for name, value in report.items()}
    for prefix, key in (("latency_ms.", "latency"), ("first_token_ms.", "first"), ("next_token_ms.", "next")):
        found = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        report |= {f"{key}.{name}": value for name, value in found.items()}
    report |= {name: value for name, value in values.items() if name.startswith("throughput.")}
    report["time.evaluate"] = 1000 * values["time_s.evaluate"]
    others = (("throughput.training", "samples_per_second"), ("step.train", "train_step_ms"))
    return report | {key: values[name] for key, name in others if name in values}


def _counts(result: Result) -> dict[str, int]:
    """How many calls of each kind of work went into what was reported."""
    counts = {m.name.removeprefix("latency_ms."): m.samples for m in result.measurements if "latency_ms." in m.name}
    steps = result.measurement("train_step_ms")
    return counts | ({"train": steps.samples} if steps else {})


def _timed(artifact: Artifact) -> Result:
    """Let a worker time all requests of a prepared workload."""
    with Crew([artifact], SILENCE) as crew:
        crew.load()
        for name in crew.requests():
            crew.time_request(name)
        return crew.results()[0]


def _prepare_in_child(spec: RunSpec, directory: Path) -> Artifact:
    """Prepare a workload in a process of its own, as a suite does."""
    path = directory / "spec.json"
    write_json(path, spec.to_json())
    command = worker_command("prepare", str(path), str(directory), "")
    with Child(command, directory / "prepare.log", environment() | binding(), SILENCE) as child:
        for message in child.messages():
            child.check(message)
            if "done" in message:
                return Artifact.read(directory)
        raise child.post_mortem()


@contextlib.contextmanager
def competing_load(processes: int = 2) -> Iterator[None]:
    """Keep the processor busy with other processes while the body runs."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def terminal_table(checks: Sequence[Check]) -> Table:
    """What the workloads saw and the instruments reported, and how far off the naive sampler was in its own run."""
    table = Table("", "truth", "reported", "unit", "error", "bound", "", "naive error", "")
    kind = ""
    for check in checks:
        bound = check.bound
        if bound.kind != kind:
            kind = bound.kind
            table.add_section()
            table.add_row(Text(kind, style="bold"))
        if check.real is None:
            table.add_row(bound.name, "skipped")
            table.caption = f"skipped, {bound.name}: {check.skipped}"
            continue
        truth, report = (f"{value:.4g}" for value in check.real)
        naive = check.shown_error(check.naive) if check.naive else "–"
        right, naive_right = (
            Text("✓", style="green") if good else Text("✗", style="red") for good in (check.ok, check.naive_ok)
        )
        limit = f"{bound.limit:.0%}" if bound.relative else f"{bound.limit:g}"
        error = check.shown_error(check.real)
        table.add_row(bound.name, truth, report, bound.unit, error, limit, right, naive, naive_right)
    return table
