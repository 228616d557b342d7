"""Training that was cut short: every engine goes on with the same losses, stages are not trained twice, ranks die."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pareto_core import Budget, Engine, Method, MethodSpec, RunSpec, Stage, TaskRef, Training
from pareto_core.cache import write_json
from pareto_core.testing import TinyTask
from pareto_core.weights import freeze
from pareto_runner.checkpoint import Checkpoints
from pareto_runner.engines import make_loop
from pareto_runner.isolate import Child, environment, worker_command
from pareto_runner.phases import Phases
from pareto_runner.randomness import seed_everything
from pareto_runner.run import Artifact, prepare
from pareto_runner.targets.xeon import XeonTarget
from pareto_runner.train import TrainingRun, batch_stream, rate_factor, train
from pareto_runner.worker import failure


class Killed(Exception):
    """Stands for a kill: nothing of the process remains but its files."""


def kill_at(last: int) -> Any:
    def on_step(step: int, steps: int, loss: float) -> None:
        if step == last:
            raise Killed

    return on_step


def noisy() -> Any:
    """A model with dropout, of which the last layer and the head are trained."""
    model: Any = freeze(TinyTask().backbone())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
        if name in ("bert.encoder.layer.1", "classifier"):
            module.requires_grad_(True)
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrinking(Method):
    """Edits a weight and its momentum after each step: checkpoints must keep both."""

    def after_step(self, model: Any, progress: float, edit: Any) -> None:
        weight = next(p for name, p in model.named_parameters() if name.endswith("classifier.weight"))
        edit.set(weight, 0.9 * edit.get(weight))
        edit.set_state(weight, "exp_avg", 0.5 * edit.get_state(weight, "exp_avg"))


def run(directory: Path, engine: Engine, settings: Training, on_step: Any = lambda *_: None) -> tuple[TrainingRun, Any]:
    """Train in ``directory`` with a checkpoint after every step, as a process of its own would."""
    seed_everything(3)
    model = noisy()
    loop = make_loop(model, settings, engine, engine.precision or "fp32", "cpu", "cpu", noisy)
    checkpoints = Checkpoints(directory, "identity", Phases(XeonTarget()), seconds=0)
    done = train(loop, model, TinyTask(), (Shrinking(),), settings, 3, on_step, checkpoints)
    return done, loop.finish()


ENGINES = {
    "torch": Engine(name="torch"),
    "zero0": Engine(zero_stage=0),
    "zero1": Engine(zero_stage=1),
    "zero2": Engine(zero_stage=2),
    "zero2 bf16": Engine(zero_stage=2, precision="bf16"),
    "zero3": Engine(zero_stage=3),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_goes_on_with_the_same_losses_and_weights(engine: str, tmp_path: Path) -> None:
    chosen = ENGINES[engine]
    settings = Training(
        learning_rate=1e-2, batch_size=16, budget=Budget(max_steps=10), gradient_accumulation=2, warmup_steps=2
    )
    whole, expected = run(tmp_path / "whole", chosen, settings)
    with pytest.raises(Killed):
        run(tmp_path / "cut", chosen, settings, kill_at(7))
    rest, model = run(tmp_path / "cut", chosen, settings)
    assert rest.resumed_steps == 6
    assert rest.curve == whole.curve
    assert rest.items == whole.items == 160
    assert len(rest.step_seconds) == 10
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_the_best_weights_so_far_survive(tmp_path: Path) -> None:
    settings = Training(learning_rate=0.3, batch_size=16, budget=Budget(epochs=4.0), select="best")
    engine = Engine(name="torch")
    _, expected = run(tmp_path / "whole", engine, settings)
    with pytest.raises(Killed):
        run(tmp_path / "cut", engine, settings, kill_at(15))
    _, model = run(tmp_path / "cut", engine, settings)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing(TinyTask):
    """Draws from every global generator for each batch, as a task that augments its data would."""

    def batches(self, split: Any, batch_size: int, seed: int) -> Iterator[Any]:
        for batch in super().batches(split, batch_size, seed):
            if split == "train":
                ids = batch["input_ids"]
                tokens = [random.randrange(3), np.random.randint(3), int(torch.randint(3, ()))]  # noqa: NPY002
                ids = torch.cat([ids[:, :-3], torch.tensor(tokens).expand(len(ids), 3)], 1)
                batch = {**batch, "input_ids": ids}
            yield batch


def test_draws_of_a_task_are_not_repeated(tmp_path: Path) -> None:
    settings = Training(learning_rate=1e-2, batch_size=16, budget=Budget(max_steps=11))

    def curve(directory: Path, on_step: Any = lambda *_: None) -> Any:
        seed_everything(3)
        model = noisy()
        loop = make_loop(model, settings, Engine(name="torch"), "fp32", "cpu", None, noisy)
        checkpoints = Checkpoints(directory, "identity", Phases(XeonTarget()), seconds=0)
        return train(loop, model, Drawing(), (), settings, 3, on_step, checkpoints).curve

    whole = curve(tmp_path / "whole")
    with pytest.raises(Killed):
        curve(tmp_path / "cut", kill_at(7))
    assert curve(tmp_path / "cut") == whole


def spec(*stages: Stage, **engine: Any) -> RunSpec:
    return RunSpec(
        question="q",
        variant="v",
        stages=stages,
        task=TaskRef(name="core.tiny", fields={}),
        target="xeon",
        engine=Engine(**{"name": "torch", "precision": "fp32", **engine}),
        seed=5,
    )


def stage(name: str, steps: int, **fields: Any) -> Stage:
    training = Training(learning_rate=1e-2, batch_size=16, budget=Budget(max_steps=steps))
    return Stage(methods=(MethodSpec(name=name, fields=fields),), training=training)


def test_a_trained_stage_is_not_trained_again(tmp_path: Path) -> None:
    two = spec(stage("full", 6), stage("krona", 5, a_shape=[8, 6]))
    whole = prepare(two, tmp_path / "whole").result
    seen: list[tuple[int, int]] = []
    notes: list[str] = []

    def on_step(step: int, steps: int, loss: float) -> None:
        seen.append((step, steps))
        if len(seen) == 9:
            raise Killed

    with pytest.raises(Killed):
        prepare(two, tmp_path / "cut", on_step=on_step, checkpoint_seconds=math.inf)
    assert seen[-1] == (3, 5)
    result = prepare(two, tmp_path / "cut", on_step=on_step, note=notes.append).result
    assert seen[9:] == [(step, 5) for step in range(1, 6)]
    assert notes == ["training goes on after step 6"]
    assert result.curve == whole.curve
    assert result.value("accuracy") == whole.value("accuracy")
    assert result.value("resumed_steps") == 6
    assert whole.value("resumed_steps") is None


def test_the_result_has_the_time_of_all_training_and_checkpoints_go(tmp_path: Path) -> None:
    def slow(step: int, steps: int, loss: float) -> None:
        time.sleep(0.05)
        if step == 9:
            raise Killed

    one = spec(stage("full", 10))
    with pytest.raises(Killed):
        prepare(one, tmp_path, on_step=slow, checkpoint_seconds=0)
    assert [path.name for path in (tmp_path / "checkpoint" / "stage0").iterdir()] == ["step8"]
    result = prepare(one, tmp_path, checkpoint_seconds=0).result
    assert result.value("resumed_steps") == 8
    assert result.value("training_steps") == 10
    assert result.value("time_s.train") > 8 * 0.05  # type: ignore[operator]
    assert result.value("time_s.checkpoint") > 0  # type: ignore[operator]
    assert result.value("train_peak_mib") < 500  # type: ignore[operator]
    assert not (tmp_path / "checkpoint").exists()
    assert Artifact.read(tmp_path).result == result


def test_a_run_too_short_for_a_checkpoint_has_none(tmp_path: Path) -> None:
    result = prepare(spec(stage("full", 3)), tmp_path).result
    assert result.value("time_s.checkpoint") is None


def test_a_killed_worker_is_followed_by_one_that_goes_on(tmp_path: Path) -> None:
    one = spec(stage("full", 60))
    write_json(tmp_path / "cut" / "spec.json", one.to_json())
    command = worker_command("prepare", str(tmp_path / "cut" / "spec.json"), str(tmp_path / "cut"), "")
    threads = str(torch.get_num_threads())  # their number decides the last digits
    variables = {**environment(), "PARETO_CHECKPOINT_SECONDS": "0", "OMP_NUM_THREADS": threads}
    steps = []
    with Child(command, tmp_path / "log", variables, limit=120) as child:
        for message in child.messages():
            steps.append(message["step"])
            if steps[-1] == 5:
                os.kill(child.pid, signal.SIGKILL)
        assert "SIGKILL" in str(child.post_mortem())
    notes: list[str] = []
    result = prepare(one, tmp_path / "cut", note=notes.append).result
    assert result.value("resumed_steps") in (steps[-1] - 1, steps[-1])
    assert notes[-1] == f"training goes on after step {result.value('resumed_steps'):g}"
    whole = prepare(one, tmp_path / "whole").result
    assert [loss for _, loss in result.curve] == pytest.approx([loss for _, loss in whole.curve], abs=1e-6)


@pytest.fixture(scope="module")
def ranks() -> Any:
    """The module ``ranks.py``, beside this file."""
    path = Path(__file__).with_name("ranks.py")
    spec = importlib.util.spec_from_file_location("ranks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks"] = module
    spec.loader.exec_module(module)
    return module


def two_processes(directory: Path, what: str) -> Child:
    command = worker_command(processes=2)
    script = [str(Path(__file__).with_name("ranks.py")), str(directory), what]
    return Child([*command[: command.index("--module")], *script], directory / "log", environment(2, "cpu"), limit=120)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two processes train all that :mod:`ranks` has; the second is killed in its last training, at step 7."""
    directory = tmp_path_factory.mktemp("pair")
    found: dict[str, Any] = {"directory": directory, "curves": {}}
    with two_processes(directory, "all") as child:
        command = Path(f"/proc/{child.pid}/cmdline").read_text().split("\0")
        found["port"] = next(word.partition("=")[2] for word in command if word.startswith("--master_port="))
        for message in child.messages():
            if "case" in message:
                found["curves"][tuple(message["case"])] = message["curve"]
            found |= {key: message[key] for key in ("whole", "rest") if key in message}
            if message.get("step") == 7:
                found["ranks"] = started_by(child.pid)
                os.kill(found["ranks"][1], signal.SIGKILL)
                start = time.monotonic()
        found["seconds"] = time.monotonic() - start
        found["end"] = child.post_mortem()
    return found


def started_by(launcher: int) -> list[int]:
    """Processes that the launcher started, first rank first."""
    return sorted(map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()))


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_no_shared_memory_is_left_behind(pair: Any) -> None:
    assert pair["curves"]  # they did communicate
    assert not list(Path("/dev/shm").glob(f"*_{pair['port']}_*"))


def test_two_processes_have_the_losses_of_one(pair: Any, ranks: Any) -> None:
    for case in ranks.CASES:
        assert pair["curves"][case] == pytest.approx(ranks.curve(*case, processes=1), abs=1e-5), case


@pytest.mark.parametrize("kind", ["rows", "tokens", "next"])
def test_the_loss_is_the_mean_over_the_labels_of_the_whole_batch(pair: Any, ranks: Any, kind: str) -> None:
    model, training = ranks.Speaker(kind), ranks.settings()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    losses = []
    for step, batch in enumerate(batch_stream(ranks.Lengths(kind=kind), 12, 3, ranks.STEPS), start=1):
        optimizer.param_groups[0]["lr"] = training.learning_rate * rate_factor(step, ranks.STEPS, training)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    for case in ranks.CASES:
        if case[0] == kind:
            assert pair["curves"][case] == pytest.approx(losses, abs=1e-5), case


def test_a_killed_rank_ends_the_run_within_seconds(pair: Any) -> None:
    assert pair["seconds"] < 30
    assert len(pair["ranks"]) == 2
    assert not any(map(alive, pair["ranks"]))
    assert "rest" not in pair
    assert "ended with status" in str(pair["end"])


def test_a_process_that_lost_another_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:48544: Connection reset by peer.")
    assert failure(lost)["error"].startswith("RuntimeError: [gloo")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert failure(lost)["error"] == "one of the run's 2 processes ended, and the others with it"


def test_two_processes_go_on_with_the_same_losses(pair: Any) -> None:
    with two_processes(pair["directory"], "rest") as child:
        messages = list(child.messages())
        assert child.wait() == 0
    assert [message["step"] for message in messages[:-1]] == list(range(7, 21))
    assert messages[-1] == {"rest": pair["whole"], "resumed": 6}
