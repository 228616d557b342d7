"""What runs in a child process: prepare a variant, or answer the turns of a measurement. Started by isolate.py."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pareto_core import ParetoError, Request, RunSpec, UnsupportedError
from pareto_runner import discover
from pareto_runner.checkpoint import seconds_between
from pareto_runner.engines import distributed, init_deepspeed
from pareto_runner.isolate import say
from pareto_runner.memory import peak_host_bytes, reset_host_peak, resident_host_bytes
from pareto_runner.phases import MIB, Phases
from pareto_runner.run import Artifact, StageWork, answer_of, load_deployed, prepare, relative_difference
from pareto_runner.train import batch_stream, rate_factor


def set_threads() -> None:
    """Use as many threads as the parent said."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def prepare_in_child(spec_path: str, directory: str, labels: str) -> None:
    """Prepare the variant that a file describes; tells of steps, and of what becomes of checkpoints, as they happen."""
    spec = RunSpec.from_json(json.loads(Path(spec_path).read_text()))
    first = distributed()[0] == 0

    def on_step(step: int, steps: int, loss: float) -> None:
        if first:
            say({"step": step, "steps": steps, "loss": loss})

    def note(text: str) -> None:
        if first:
            say({"note": text})

    prepare(spec, Path(directory), Path(labels) if labels else None, on_step, note, seconds_between())
    if first:
        say({"done": True})


class InferenceTurns:
    """Holds a deployed model and times the calls of its task's requests."""

    def __init__(self, artifact: Artifact) -> None:
        self._target = discover.make_target(artifact.spec.target)
        self._artifact = artifact
        self._requests = discover.make_task(artifact.spec.task).requests()
        discover.make_method(artifact.spec.stages[-1].methods[-1])
        for name in artifact.libraries():  # their weight is not the model's
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        idle = resident_host_bytes()
        self._base = idle if self._target.device == "cpu" else 0
        reset_host_peak()
        self._model = load_deployed(artifact)
        self.load_peak_mib = (peak_host_bytes() - idle) / MIB
        self._call: Callable[..., Any] = lambda: None
        self._request = next(iter(self._requests.values()))

    def requests(self) -> dict[str, Any]:
        """Batch size of each request, and the repeats of its protocol (0: sampled adaptively)."""
        return {
            name: {"batch_size": r.batch_size, "repeats": r.protocol.repeats if r.protocol else 0}
            for name, r in self._requests.items()
        }

    def choose(self, name: str) -> dict[str, Any]:
        """Get ready for a request: check the answer against the one from the end of preparation, read the peak."""
        self._request: Request = self._requests[name]
        self._target.reset_peak_memory()
        self._call = self._target.prepare(self._model, self._request)
        output = self._call()
        self._target.synchronize()
        peak = self.peak()
        difference = self._difference(name, output)
        del output
        self._target.reset_peak_memory()  # the comparison's memory is not the model's
        return {"difference": difference, **peak}

    def peak(self) -> dict[str, float]:
        """Highest memory use, in MiB, of the chosen request's calls; on a CPU above what was there before the model."""
        return {"peak_mib": (self._target.peak_memory() - self._base) / MIB}

    def _difference(self, name: str, output: Any) -> float:
        from safetensors import safe_open

        with safe_open(self._artifact.directory / "reference.safetensors", "pt") as file:
            return relative_difference(file.get_tensor(name).float(), answer_of(output).float())

    def turn(self, seconds: float) -> dict[str, Any]:
        """Timed calls for ``seconds`` (at least one), after one that is not counted.

        That first call finds the caches and the other CPU as another worker left them; where a call is longer than the
        turn it is counted, since it dwarfs what it finds.
        """
        end = time.perf_counter() + seconds
        calls = [self._timed()]
        if calls[0]["times"] < seconds:
            end, calls = time.perf_counter() + seconds, [self._timed()]
        while time.perf_counter() < end:
            calls.append(self._timed())
        return _columns(calls)

    def protocol(self) -> dict[str, Any]:
        """Warm-ups and runs as the request's protocol fixes them, one repeat."""
        fixed = self._request.protocol
        assert fixed is not None
        for _ in range(fixed.warmups):
            self._timed()
        return _columns([self._timed() for _ in range(fixed.runs)])

    def _timed(self) -> dict[str, float]:
        if self._request.kind == "generate":
            return self._timed_generation()
        start = time.perf_counter()
        self._call()
        self._target.synchronize()
        return {"times": time.perf_counter() - start}

    def _timed_generation(self) -> dict[str, float]:
        clock = TokenClock(self._target.synchronize, self._request.batch_size)
        start = time.perf_counter()
        self._call(streamer=clock)
        self._target.synchronize()
        end = time.perf_counter()
        if not clock.times:
            raise UnsupportedError("the model generates without telling its streamer of tokens, which times them")
        found = {"times": end - start, "first": clock.times[0] - start}
        if len(clock.times) > 1:
            found["next"] = clock.next_token_seconds()
        return found


class TokenClock:
    """A streamer that notes when new tokens arrive, one or several at once; the prompt comes first and is not one.

    ``batch_size`` sequences are generated together, and count as one.
    """

    def __init__(self, synchronize: Callable[[], None], batch_size: int = 1) -> None:
        self._synchronize = synchronize
        self._batch_size = batch_size
        self._prompt_seen = False
        self._tokens = 0
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the arrival of the tokens in the tensor ``value``."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._synchronize()
        self.times.append(time.perf_counter())
        self._tokens += value.numel() // self._batch_size

    def next_token_seconds(self) -> float:
        """Seconds from the first arrival to the last, by token after the first: right for bursts too."""
        return (self.times[-1] - self.times[0]) / (self._tokens - 1)

    def end(self) -> None:
        """Nothing remains to be done."""


class TrainingTurns:
    """Holds a variant's first stage in its engine, where it ``trains`` anything, and times optimizer steps."""

    def __init__(self, artifact: Artifact) -> None:
        spec = artifact.spec
        target, task = discover.make_target(spec.target), discover.make_task(spec.task)
        self._synchronize = target.synchronize
        stage = spec.stages[0]
        methods = [discover.make_method(method) for method in stage.methods]
        work = StageWork(spec, stage, methods, target, task, Phases(target), {})
        model = work.build(task.frozen_backbone())
        self.trains = any(p.requires_grad for p in model.parameters())
        if not self.trains:
            return
        self._training, self._loop = stage.training, work.loop(model)
        model.train()
        self._batches: Iterator[Any] = batch_stream(task, stage.training.batch_size, spec.seed, 10**9)

    def steps(self, count: int) -> dict[str, Any]:
        """Timed optimizer steps: every worker takes the same number, over the same batches."""
        return {"times": [self._step() for _ in range(count)]}

    def _step(self) -> float:
        batch = next(self._batches)
        rate = self._training.learning_rate * rate_factor(2, 10**9, self._training)
        start = time.perf_counter()
        self._loop.step(batch, rate)
        self._synchronize()
        return time.perf_counter() - start


def _columns(calls: list[dict[str, float]]) -> dict[str, Any]:
    return {key: [call[key] for call in calls] for key in calls[0]}


def answer_turns(directory: str) -> None:
    """Load, then answer commands from standard input, one JSON line each."""
    artifact = Artifact.read(Path(directory))
    turns: Any = None
    for command in commands():
        try:
            if command["do"] == "load":
                turns = InferenceTurns(artifact)
                say({"requests": turns.requests(), "peak_mib": turns.load_peak_mib})
            elif command["do"] == "train":
                turns = None  # the finished model's memory is free before the next model is built
                turns = TrainingTurns(artifact)
                say({"trains": turns.trains})
            elif command["do"] == "choose":
                say(turns.choose(command["request"]))
            elif command["do"] == "turn":
                say(turns.turn(command["seconds"]))
            elif command["do"] == "peak":
                say(turns.peak())
            elif command["do"] == "steps":
                say(turns.steps(command["count"]))
            elif command["do"] == "protocol":
                say(turns.protocol())
        except Exception as error:
            say(failure(error))
            return


def commands() -> Iterator[dict[str, Any]]:
    """Yield the parent's commands, read in a thread: when the parent ends, so does this process, busy or not."""
    arrived: queue.SimpleQueue[str] = queue.SimpleQueue()
    follow_parent(arrived.put)
    while True:
        yield json.loads(arrived.get())


def follow_parent(hear: Callable[[str], None] = lambda _: None) -> None:
    """Pass on what the parent writes, in a thread; at its end this process group ends, whatever it is doing."""

    def follow() -> None:
        for line in sys.stdin:
            hear(line)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def log_traceback(error: BaseException) -> None:
    """Write a traceback to the log, unless the log's disk is what is full."""
    with contextlib.suppress(OSError):
        traceback.print_exception(error)


def failure(error: BaseException) -> dict[str, str]:
    """Describe an error for the parent; the traceback of one that nobody foresaw goes to the log."""
    if isinstance(error, MemoryError) or "not enough memory" in str(error) or "out of memory" in str(error):
        log_traceback(error)
        return {"error": f"out of memory: {(str(error).splitlines() or [type(error).__name__])[0]}", "kind": "failed"}
    if not isinstance(error, ParetoError):
        log_traceback(error)
        _, world = distributed()
        if world > 1 and "by peer" in str(error):  # what Gloo says of a connection whose other end is gone
            return {"error": f"one of the run's {world} processes ended, and the others with it", "kind": "failed"}
        return {"error": f"{type(error).__name__}: {error}", "kind": "failed"}
    return {"error": str(error), "kind": "unsupported" if isinstance(error, UnsupportedError) else "failed"}


def main() -> int:
    """Entry point of the child process."""
    arguments = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
    # Read by transformers when a task imports it; importing it here would cost all others seconds.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    set_threads()
    try:
        if arguments[0] != "turns" and stat.S_ISFIFO(os.fstat(0).st_mode):  # else it was started by hand
            follow_parent()
        if arguments[0] == "prepare":
            prepare_in_child(*arguments[1:])
        elif arguments[0] == "turns":
            answer_turns(*arguments[1:])
        else:
            init_deepspeed(arguments[1])
            say({"done": True})
    except Exception as error:
        say(failure(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
