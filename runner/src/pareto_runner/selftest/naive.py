"""A sampler with the defects that benchmark scripts often have. The checks that the runner passes must fail on it."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from pareto_core import Batch, Request
from pareto_runner import discover
from pareto_runner.memory import resident_host_bytes
from pareto_runner.run import MIB, Artifact, load_deployed
from pareto_runner.targets.calls import make_call

CALLS = 12


class NaiveSampler:
    """Times a fixed number of calls, the slow first ones among them, and takes their mean.

    It stops the clock without waiting for the device, counts the prompt as the first token and its processing into the
    pauses between tokens, looks at the process's memory every 10 ms, or only after loading, whatever the device, and
    divides all items by the seconds of one step.
    """

    def __init__(self, artifact: Artifact, device: str = "cpu") -> None:
        self._artifact, self._device = artifact, device
        self._task = discover.make_task(artifact.spec.task)
        self._idle = resident_host_bytes()
        self._model: Any = load_deployed(artifact)
        self._loaded = resident_host_bytes()

    def training(self) -> dict[str, float]:
        """Readings of training."""
        spec = self._artifact.spec
        model: Any = discover.make_method(spec.stages[0].methods[0]).build(self._task)
        batch_size = spec.stages[0].training.batch_size
        batches = list(self._task.batches("train", batch_size, 0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def step(batch: Batch) -> None:
            model(**batch).loss.backward()
            optimizer.step()

        with Poller() as poller:
            mean = statistics.fmean(_seconds(partial(step, batch)) for batch in batches)
        return {
            "peak.train": poller.peak / MIB,
            "throughput.training": len(batches) * batch_size / mean,
            "step.train": 1000 * mean,
        }

    def evaluation(self) -> dict[str, float]:
        """Readings of evaluation."""
        with Poller() as poller:
            seconds = _seconds(lambda: self._task.records(self._model, "test"))
        return {"peak.evaluate": poller.peak / MIB, "time.evaluate": 1000 * seconds}

    def requests(self, names: Sequence[str]) -> dict[str, float]:
        """Readings of requests."""
        found: dict[str, float] = {}
        with Poller() as poller:
            for name in names:
                request = self._task.requests()[name]
                call = make_call(self._model, request, self._device)
                timed = self._generation if request.kind == "generate" else self._forward
                found |= timed(name, request, call)
        found["peak.inference"] = (poller.peak - self._idle) / MIB
        found["peak.load"] = (self._loaded - self._idle) / MIB
        return found

    def _forward(self, name: str, request: Request, call: Callable[..., Any]) -> dict[str, float]:
        mean = statistics.fmean(_seconds(call) for _ in range(CALLS))
        return {f"latency.{name}": 1000 * mean, f"throughput.{name}": request.batch_size / mean}

    def _generation(self, name: str, request: Request, call: Callable[..., Any]) -> dict[str, float]:
        first, following = [], []
        for _ in range(CALLS):
            arrivals = Arrivals()
            start = time.perf_counter()
            call(streamer=arrivals)
            first.append(arrivals.times[0] - start)
            following.append((time.perf_counter() - start) / len(arrivals.times))
        return {
            f"first.{name}": 1000 * statistics.fmean(first),
            f"next.{name}": 1000 * statistics.fmean(following),
        }


class Arrivals:
    """A streamer that notes whatever comes, the prompt too."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note that something came."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing remains to be done."""


class Poller:
    """Looks at the resident memory every 10 ms, in a thread, and remembers the highest figure."""

    def __init__(self) -> None:
        self.peak = resident_host_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, resident_host_bytes())


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
