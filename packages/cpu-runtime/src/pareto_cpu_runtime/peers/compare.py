"""The two comparisons: whole models with llama.cpp, and linear layers with OpenVINO and torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pareto_core import ModelError
from pareto_cpu_runtime import _native
from pareto_cpu_runtime.peers import packed_model
from pareto_cpu_runtime.peers.geometry import Geometry
from pareto_cpu_runtime.peers.intervals import Interval, ratio_of_medians
from pareto_cpu_runtime.peers.workers import Worker, run_script, script

#: correlation that two runtimes' answers must have; both quantise activations, each in its own way
LEAST_CORRELATION = 0.99
PROMPT, NEW, LONG_PROMPT = 32, 32, 512
GROUPS = (32, 128)
#: requests at a time; the first is what the others are compared with
REQUESTS = (1, 8)


@dataclasses.dataclass
class Timed:
    """One case: seconds by runtime, turn by turn, and what it moves or computes."""

    case: str
    seconds: dict[str, list[float]]
    giga_operations: float = 0.0
    gigabytes: dict[str, float] = dataclasses.field(default_factory=dict)

    def ratio(self, peer: str, ours: str) -> Interval:
        """How many times as fast ``ours`` is as ``peer``."""
        return ratio_of_medians(self.seconds[peer], self.seconds[ours])


@dataclasses.dataclass
class Table:
    """What was measured with one thread count, and the limits in the same run."""

    title: str
    threads: int
    read_gb_per_s: list[float]
    int8_gops: list[float]
    cases: list[Timed]
    agreement: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Every figure, turn by turn."""
        return dataclasses.asdict(self)


class LimitsMeter:
    """Measures what the machine reads and multiplies at most, between the turns of a comparison."""

    BYTES, ROUNDS = 512 << 20, 5_000_000

    def __init__(self, threads: int) -> None:
        self._pool = _native.Pool(threads)
        self._block = _native.Block(self.BYTES)
        self._block.array()[:] = 1
        self.read: list[float] = []
        self.multiply: list[float] = []

    def turn(self) -> None:
        """One measurement of each."""
        self.read.append(self.BYTES / _native.read_seconds(self._pool, self._block) / 1e9)
        if _native.MULTIPLY_ADDS_PER_ROUND:
            operations = 2 * self.ROUNDS * _native.MULTIPLY_ADDS_PER_ROUND * self._pool.threads
            self.multiply.append(operations / _native.multiply_seconds(self._pool, self.ROUNDS) / 1e9)


def in_turns(workers: Sequence[Worker], turns: int, turn: Callable[[Worker, int], None], what: str) -> None:
    """Call ``turn`` for every worker, ``turns`` times; who begins changes from turn to turn."""
    for number in range(turns):
        first = number % len(workers)
        for worker in [*workers[first:], *workers[:first]]:
            turn(worker, number)
        live = sys.stderr.isatty()
        if live or number + 1 == turns:
            print(f"\r{what}: {number + 1}/{turns}", end="" if live and number + 1 < turns else "\n", file=sys.stderr)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two answers; NaN where one is constant."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def check_agreement(answers: dict[str, np.ndarray], against: dict[str, str]) -> dict[str, float]:
    """Correlation of each answer with the one it is compared to; raises ModelError where one is too low."""
    found = {name: correlation(answers[name], answers[other]) for name, other in against.items()}
    for name, value in found.items():
        if not value >= LEAST_CORRELATION:
            raise ModelError(f"{name} and {against[name]} answer differently (correlation {value:.3f}): nothing timed")
    return found


def model_workers(
    stack: contextlib.ExitStack, geometry: Geometry, folder: Path, python: str, threads: int, slots: int
) -> list[Worker]:
    """llama.cpp and ours at both group sizes, for ``slots`` requests at a time; the model is written at first."""
    gguf = folder / "model.gguf"
    if not gguf.exists():
        print("writing the random model for each runtime", file=sys.stderr)
        run_script(python, "gguf_writer.py", geometry=dataclasses.asdict(geometry), path=str(gguf))
        for group in GROUPS:
            packed_model.write(geometry, group, folder / f"packed-{group}")
    length = LONG_PROMPT + 2 * NEW
    # llama.cpp's context is that of all requests together, ours that of each.
    context = max(length, slots * (PROMPT + 2 * NEW))
    llama = [python, script("llama_worker.py"), str(gguf), *map(str, (threads, context, LONG_PROMPT, slots))]
    workers = [stack.enter_context(Worker("llama.cpp", llama, threads))]
    for group in GROUPS:
        module = [sys.executable, "-m", "pareto_cpu_runtime.peers.pareto_worker"]
        command = [*module, str(folder / f"packed-{group}"), *map(str, (threads, length, slots))]
        workers.append(stack.enter_context(Worker(f"ours, group {group}", command, threads)))
    return workers


def models(geometry: Geometry, folder: Path, python: str, threads: int, turns: int) -> Table:
    """First and next token of whole models, llama.cpp's and ours at both group sizes."""
    meter = LimitsMeter(threads)
    with contextlib.ExitStack() as stack:
        workers = model_workers(stack, geometry, folder, python, threads, 1)
        agreement = agree(workers, geometry, folder)
        cases = [Timed(name, {w.name: [] for w in workers}) for name in CASES]
        short, long = prompts(geometry)
        for worker in workers:
            worker.ask(prompt=short, new=NEW)  # warms up
            worker.ask(prompt=long, new=2)

        def turn(worker: Worker, number: int) -> None:
            meter.turn()
            times = worker.ask(prompt=short, new=NEW)["times"]
            cases[0].seconds[worker.name].append((times[-1] - times[1]) / (len(times) - 2))
            cases[1].seconds[worker.name].append(times[1] - times[0])
            if number % 3 == 0:
                times = worker.ask(prompt=long, new=2)["times"]
                cases[2].seconds[worker.name].append(times[1] - times[0])

        in_turns(workers, turns, turn, f"models, {threads} threads")
    weights = [(n, k) for _, n, k in geometry.matrices()]
    body = sum(n * k for n, k in weights[:-1])
    head = weights[-1][0] * weights[-1][1]
    for group in GROUPS:
        size = sum(_native.packed_bytes(n, k, group) for n, k in weights) / 1e9
        cases[0].gigabytes[f"ours, group {group}"] = size
    cases[0].gigabytes["llama.cpp"] = (body + head) / 32 * 18 / 1e9
    for case, rows in ((cases[1], PROMPT), (cases[2], LONG_PROMPT)):
        case.giga_operations = 2 * (body * rows + head) / 1e9
    return Table("whole model", threads, meter.read, meter.multiply, cases, agreement)


@dataclasses.dataclass
class Together:
    """Requests served together and alone: (first tokens, all others) in seconds by runtime and count, turn by turn."""

    threads: int
    prompt: int
    new: int
    seconds: dict[str, dict[int, list[tuple[float, float]]]]

    def throughput(self, runtime: str, requests: int) -> Interval:
        """How many times as many tokens per second as one request alone, prompts included."""
        whole = {n: [sum(turn) for turn in turns] for n, turns in self.seconds[runtime].items()}
        return ratio_of_medians([requests * seconds for seconds in whole[1]], whole[requests])

    def throughput_of_steps(self, runtime: str, requests: int) -> Interval:
        """The same from the first tokens on: what continuous batching runs while nobody joins."""
        steps = {n: [after for _, after in turns] for n, turns in self.seconds[runtime].items()}
        return ratio_of_medians([requests * seconds for seconds in steps[1]], steps[requests])

    def to_json(self) -> dict[str, Any]:
        """Every figure, turn by turn."""
        return dataclasses.asdict(self)


def together(geometry: Geometry, folder: Path, python: str, threads: int, turns: int) -> Together:
    """Eight requests at a time beside one, in each runtime; ours must answer each as it does alone."""
    drawn = np.random.default_rng(1).integers(0, geometry.vocabulary, (max(REQUESTS), PROMPT)).tolist()
    with contextlib.ExitStack() as stack:
        workers = model_workers(stack, geometry, folder, python, threads, max(REQUESTS))
        agree(workers, geometry, folder)
        for worker in workers:  # warms up
            answer = worker.ask(prompts=drawn, new=8)
            for prompt, tokens in zip(drawn, answer.get("tokens", ()), strict=False):
                if worker.ask(prompts=[prompt], new=8)["tokens"] != [tokens]:
                    raise ModelError(f"{worker.name}: a request was answered otherwise than alone: nothing timed")
        found = Together(threads, PROMPT, 2 * NEW, {w.name: {n: [] for n in REQUESTS} for w in workers})

        def turn(worker: Worker, _number: int) -> None:
            for count in REQUESTS:
                start, first, end = worker.ask(prompts=drawn[:count], new=found.new)["times"]
                found.seconds[worker.name][count].append((first - start, end - first))

        in_turns(workers, turns, turn, f"requests together, {threads} threads")
    return found


CASES = ("next token", f"first token, {PROMPT} in", f"first token, {LONG_PROMPT} in")


def prompts(geometry: Geometry) -> tuple[list[int], list[int]]:
    """A short and a long prompt, the same for all."""
    drawn = np.random.default_rng(0).integers(0, geometry.vocabulary, LONG_PROMPT).tolist()
    return drawn[:PROMPT], drawn


def agree(workers: Sequence[Worker], geometry: Geometry, folder: Path) -> dict[str, float]:
    """Compare the logits after four tokens: ours at 32 with llama.cpp's (the same weights)."""
    answers = {}
    for worker in workers:
        path = str(folder / f"{worker.name.replace(' ', '-')}.npy")
        worker.ask(prompt=prompts(geometry)[0][:4], logits=path)
        answers[worker.name] = np.load(path)
    return check_agreement(answers, {"ours, group 32": "llama.cpp"})


def layers(geometry: Geometry, python: str, threads: int, turns: int) -> list[Table]:
    """Linear layers alone at each group size: OpenVINO, torch and ours."""
    return [stack_of_layers(geometry, python, threads, turns, group) for group in GROUPS]


def stack_of_layers(geometry: Geometry, python: str, threads: int, turns: int, group: int) -> Table:
    """One group size."""
    meter = LimitsMeter(threads)
    cases: list[Timed] = []
    weights = [(n, k) for _, n, k in geometry.matrices()]
    body, head = sum(n * k for n, k in weights[:-1]), weights[-1][0] * weights[-1][1]
    with contextlib.ExitStack() as stack:
        workers = []
        for runtime, interpreter in (("OpenVINO", python), ("torch", sys.executable), ("ours", sys.executable)):
            name = {"OpenVINO": "openvino", "torch": "torch", "ours": "pareto"}[runtime]
            asked = {"runtime": name, "geometry": dataclasses.asdict(geometry), "group": group, "threads": threads}
            command = [interpreter, script("stack_worker.py"), json.dumps(asked)]
            workers.append(stack.enter_context(Worker(runtime, command, threads)))
        agreement: dict[str, float] = {}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pareto-peers-")))
        for rows in (1, PROMPT, LONG_PROMPT):
            answers = {}
            for worker in workers:
                path = str(folder / f"{worker.name}.npy")
                worker.ask(rows=rows, times=1, save=path)
                answers[worker.name] = np.load(path)
            agreement |= check_agreement(answers, {"ours": "torch", "OpenVINO": "torch"})
            case = Timed(f"{rows} rows", {worker.name: [] for worker in workers})
            case.giga_operations = 2 * (body * rows + head) / 1e9
            case.gigabytes["ours"] = sum(_native.packed_bytes(n, k, group) for n, k in weights) / 1e9

            def turn(worker: Worker, number: int, case: Timed = case, rows: int = rows) -> None:
                meter.turn()
                case.seconds[worker.name] += worker.ask(rows=rows, times=1)["times"]

            in_turns(workers, turns if rows < LONG_PROMPT else max(3, turns // 3), turn, f"group {group}, {rows} rows")
            cases.append(case)
    title = f"linear layers, group {group}"
    return Table(title, threads, meter.read, meter.multiply, cases, agreement)
