"""What runs in a child process: prepare a variant, or answer the turns of a measurement. Started by isolate.py."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pareto_core import ParetoError, Request, RunSpec, UnsupportedError
from pareto_runner import discover
from pareto_runner.isolate import say
from pareto_runner.memory import resident_host_bytes
from pareto_runner.run import MIB, Artifact, Phases, StageWork, answer_of, load_deployed, prepare, relative_difference
from pareto_runner.train import batch_stream, distributed, rate_factor


def set_threads() -> None:
    """Use as many threads as the parent said."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def prepare_in_child(spec_path: str, directory: str, labels: str) -> None:
    """Prepare the variant that a file describes; steps are reported as they happen."""
    spec = RunSpec.from_json(json.loads(Path(spec_path).read_text()))

    def on_step(step: int, steps: int, loss: float) -> None:
        if distributed()[0] == 0:
            say({"step": step, "steps": steps, "loss": loss})

    prepare(spec, Path(directory), Path(labels) if labels else None, on_step)
    if distributed()[0] == 0:
        say({"done": True})


class InferenceTurns:
    """Holds a deployed model and times the calls of its task's requests."""

    def __init__(self, artifact: Artifact) -> None:
        self._target = discover.make_target(artifact.spec.target)
        self._artifact = artifact
        self._requests = discover.make_task(artifact.spec.task).requests()
        discover.make_method(artifact.spec.stages[-1].methods[-1])
        import transformers

        transformers.AutoModel  # noqa: B018 - the library's weight is not the model's
        self._base = resident_host_bytes() if self._target.device == "cpu" else 0
        self._target.reset_peak_memory()
        self._model = load_deployed(artifact)
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
        from safetensors.torch import load_file

        self._request: Request = self._requests[name]
        self._call = self._target.prepare(self._model, self._request)
        answer = answer_of(self._call())
        expected = load_file(self._artifact.directory / "reference.safetensors")[name]
        self._target.synchronize()
        peak = (self._target.peak_memory() - self._base) / MIB
        return {"difference": relative_difference(expected.float(), answer.float()), "peak_mib": peak}

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
        clock = TokenClock(self._target.synchronize)
        start = time.perf_counter()
        self._call(streamer=clock)
        self._target.synchronize()
        found = {"times": time.perf_counter() - start, "first": clock.times[0] - start}
        if len(clock.times) > 1:
            found["next"] = (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
        return found


class TokenClock:
    """A streamer that notes when each new token arrives; the prompt, which comes first, is not one."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._prompt_seen = False
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the arrival of a token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing remains to be done."""


class TrainingTurns:
    """Holds a variant's first stage that trains, in its engine, and times optimizer steps."""

    def __init__(self, artifact: Artifact) -> None:
        spec = artifact.spec
        target, task = discover.make_target(spec.target), discover.make_task(spec.task)
        self._synchronize = target.synchronize
        stage = spec.stages[0]
        methods = [discover.make_method(method) for method in stage.methods]
        work = StageWork(spec, stage, methods, target, task, Phases(target), {})
        model = work.build(task.frozen_backbone())
        if not any(p.requires_grad for p in model.parameters()):
            raise UnsupportedError("the first stage trains nothing")
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
    """Load, then answer commands from standard input, one JSON line each, until it ends."""
    artifact = Artifact.read(Path(directory))
    turns: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                turns = InferenceTurns(artifact)
                say({"requests": turns.requests()})
            elif command["do"] == "train":
                turns = None  # the finished model's memory is free before the next model is built
                turns = TrainingTurns(artifact)
                say({})
            elif command["do"] == "choose":
                say(turns.choose(command["request"]))
            elif command["do"] == "turn":
                say(turns.turn(command["seconds"]))
            elif command["do"] == "steps":
                say(turns.steps(command["count"]))
            elif command["do"] == "protocol":
                say(turns.protocol())
        except Exception as error:
            say(failure(error))
            return


def failure(error: Exception) -> dict[str, str]:
    """Describe an error for the parent; the traceback of one that nobody foresaw goes to the log."""
    if not isinstance(error, ParetoError):
        traceback.print_exception(error)
        return {"error": f"{type(error).__name__}: {error}", "kind": "failed"}
    return {"error": str(error), "kind": "unsupported" if isinstance(error, UnsupportedError) else "failed"}


def main() -> int:
    """Entry point of the child process."""
    from transformers.utils import logging

    arguments = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_threads()
    try:
        if arguments[0] == "prepare":
            prepare_in_child(*arguments[1:])
        elif arguments[0] == "turns":
            answer_turns(*arguments[1:])
        else:
            from pareto_runner.train import init_deepspeed

            init_deepspeed(arguments[1])
            say({"done": True})
    except Exception as error:
        say(failure(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
