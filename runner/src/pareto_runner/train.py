"""The training loop: batches, learning rates, methods' edits, the best weights; and going on from a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pareto_core import Batch, DataError, Edit, Method, Task, Training, TrainingError
from pareto_runner.checkpoint import Checkpoints
from pareto_runner.engines import Loop, distributed
from pareto_runner.randomness import noise_of, set_random_state

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass
class TrainingRun:
    """What training left behind: the loss after each optimizer step, and the seconds that each step took.

    ``resumed_steps`` of them were taken by an earlier process, up to the checkpoint that this one went on from.
    """

    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    items: int = 0
    resumed_steps: int = 0

    @property
    def samples_per_second(self) -> float:
        """Training items per second of stepping (evaluation in between does not count)."""
        return self.items / sum(self.step_seconds)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"curve": self.curve, "step_seconds": self.step_seconds, "items": self.items}


def train(
    loop: Loop,
    model: nn.Module,
    task: Task,
    methods: Sequence[Method],
    training: Training,
    seed: int,
    on_step: Callable[[int, int, float], None],
    checkpoints: Checkpoints | None = None,
) -> TrainingRun:
    """Train until the budget ends; calls ``on_step(step, steps, loss)`` after each optimizer step.

    With ``checkpoints``, goes on from the newest and writes further ones; on the CPU the curve is the same to the last
    digit as without the interruption. Where ``training.select`` is ``best``, the weights that scored best on the task's
    selection split after any epoch are restored. Raises TrainingError on a loss that is not finite.
    """
    with noise_of(*distributed(), seed):
        epoch_steps, steps = step_counts(task.size("train"), training)
        best = BestWeights(model, task) if training.select == "best" else None
        run, batches = start(loop, task, training, seed, best, checkpoints)
        model.train()
        for step, batch in enumerate(batches, start=run.resumed_steps + 1):
            begin = time.perf_counter()
            loss = loop.step(batch, training.learning_rate * rate_factor(step, steps, training))
            for method in methods:
                method.after_step(model, step / steps, loop.edit)
            run.step_seconds.append(time.perf_counter() - begin)
            if not math.isfinite(loss):
                if checkpoints is not None:
                    checkpoints.forget()
                raise TrainingError(f"the loss is {loss} at step {step} of {steps}: try a smaller learning_rate")
            run.curve.append((step, loss))
            run.items += training.batch_size
            on_step(step, steps, loss)
            if best is not None and (step % epoch_steps == 0 or step == steps):
                best.consider(loop.edit)
                model.train()
            if checkpoints is not None and checkpoints.wanted(loop, last=step == steps):
                checkpoints.save(loop, step, {"run": run.state(), "best": best.state() if best else None})
        if best is not None:
            best.restore(loop.edit)
    return run


def start(
    loop: Loop,
    task: Task,
    training: Training,
    seed: int,
    best: BestWeights | None,
    checkpoints: Checkpoints | None,
) -> tuple[TrainingRun, Iterator[Batch]]:
    """Return the run so far and the batches that follow: those after the newest checkpoint, or all."""
    _, steps = step_counts(task.size("train"), training)
    state = checkpoints.restore(loop) if checkpoints is not None else None
    if state is None:
        return TrainingRun(), batch_stream(task, training.batch_size, seed, steps)
    run = TrainingRun(**state["run"])
    run.resumed_steps = len(run.curve)
    if best is not None:
        best.set_state(state["best"])
    batches = batch_stream(task, training.batch_size, seed, steps, run.resumed_steps)
    set_random_state(state["random"])  # after the batches before were passed over, for a task may draw for each
    return run, batches


class BestWeights:
    """Keeps the trained weights that scored best on the task's selection split."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self._model, self._task = model, task
        self._score: float | None = None
        self._weights: list[torch.Tensor] = []

    def _trained(self) -> list[torch.Tensor]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def consider(self, edit: Edit) -> None:
        """Score the model as it is, and keep its weights if none before were better."""
        self._model.eval()
        metric = self._task.primary_metric
        score = self._task.score(self._task.records(self._model, self._task.selection_split))[metric.name]
        score = score if metric.higher_is_better else -score
        if self._score is None or score > self._score:
            self._score = score
            self._weights = [edit.get(p) for p in self._trained()]

    def restore(self, edit: Edit) -> None:
        """Put the best weights back."""
        for parameter, value in zip(self._trained(), self._weights, strict=True):
            edit.set(parameter, value)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"score": self._score, "weights": self._weights}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` returned."""
        self._score = state["score"]
        places = [parameter.device for parameter in self._trained()]
        # There are none before the end of the first epoch.
        self._weights = [value.to(place) for value, place in zip(state["weights"], places, strict=False)]


def step_counts(items: int, training: Training) -> tuple[int, int]:
    """Return (optimizer steps in an epoch, steps in all); an incomplete last batch of an epoch is dropped."""
    epoch = max(1, items // training.batch_size)
    budget = training.budget
    limits = [math.ceil(budget.epochs * epoch)] if budget.epochs is not None else []
    limits += [budget.max_steps] if budget.max_steps is not None else []
    return epoch, min(limits)


def batch_stream(task: Task, batch_size: int, seed: int, steps: int, taken: int = 0) -> Iterator[Batch]:
    """Return the batches of ``steps`` optimizer steps, epoch after epoch, each shuffled by its own seed.

    The first ``taken`` are left out: whole epochs without a look at their data, the rest one by one, at once. Raises
    DataError where the training split does not fill a batch.
    """
    items = task.size("train")
    if items < batch_size:
        raise DataError(f"task {task.name}: {items} training items do not fill one batch of {batch_size}")
    first, passed = divmod(taken, items // batch_size)
    epochs = (task.batches("train", batch_size, seed * 1_000_003 + epoch) for epoch in itertools.count(first))
    batches = itertools.islice(itertools.chain.from_iterable(epochs), passed + steps - taken)
    for _ in range(passed):
        next(batches)
    return batches


def rate_factor(step: int, steps: int, training: Training) -> float:
    """Factor of the learning rate at ``step`` (from 1): linear warm-up, then linear decay to 0, or constant."""
    warmup = min(training.warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    if training.schedule == "constant":
        return 1.0
    return (steps - step + 1) / (steps - warmup)
