"""The training loop, through DeepSpeed; and the plain PyTorch loop that DeepSpeed's cost is measured against."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pareto_core import Batch, Edit, Engine, Method, Task, Training, TrainingError, UnsupportedError
from pareto_core.cache import cache_directory
from pareto_core.edit import LocalEdit

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass
class TrainingRun:
    """What training left behind: the loss after each optimizer step, and the seconds that each step took."""

    curve: list[tuple[int, float]]
    step_seconds: list[float]
    items: int

    @property
    def samples_per_second(self) -> float:
        """Training items per second of stepping (evaluation in between does not count)."""
        return self.items / sum(self.step_seconds)


class Loop(Protocol):
    """An engine at work on one model: takes optimizer steps, and gives the model back."""

    edit: Edit

    def step(self, batch: Batch, learning_rate: float) -> float:
        """Take one optimizer step over a global batch; returns its mean loss."""
        ...

    def finish(self) -> nn.Module:
        """Return the trained module, whole and free of the engine."""
        ...


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    from transformers import set_seed

    set_seed(seed)


def distributed() -> tuple[int, int]:
    """Return (rank, world size) as the launcher set them; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def init_deepspeed(accelerator: str) -> None:
    """Import DeepSpeed and start its communication, building its shared-memory op the first time (CPU).

    Raises UnsupportedError where the op cannot be built, with the build's own words.
    """
    os.environ["DS_ACCELERATOR"] = accelerator
    # One folder per environment: environments that share one compile it anew each time they take turns.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_directory() / "extensions" / environment))
    if "MASTER_ADDR" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(single)
    import deepspeed

    try:
        deepspeed.init_distributed(dist_backend="nccl" if accelerator == "cuda" else "gloo", verbose=False)
    except (RuntimeError, ImportError) as error:
        raise UnsupportedError(
            f"DeepSpeed could not start: {error}. On a CPU it compiles a small C++ extension: install a C++ compiler "
            "(Debian and Ubuntu: apt-get install g++) and Python's headers (python3-dev)"
        ) from error


def deepspeed_config(training: Training, engine: Engine, precision: str, world: int) -> dict[str, Any]:
    """Translate a stage's training and engine into DeepSpeed's configuration."""
    pieces = world * training.gradient_accumulation
    if training.batch_size % pieces:
        raise UnsupportedError(
            f"batch_size {training.batch_size} does not divide into {world} processes × "
            f"{training.gradient_accumulation} accumulation steps"
        )
    parameters: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer != "sgd":
        parameters["torch_adam"] = True
    names = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
    config: dict[str, Any] = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // pieces,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": training.gradient_clipping,
        "optimizer": {"type": names[training.optimizer], "params": parameters},
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if training.optimizer == "adam":
        parameters["adam_w_mode"] = False
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config


class DeepSpeedLoop:
    """Training steps through ``deepspeed.initialize``.

    ``rebuild`` makes the untrained module again: under ZeRO-3 the trained weights are gathered into a fresh one, since
    the sharded module cannot leave the engine.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        engine: Engine,
        precision: str,
        device: str,
        rebuild: Callable[[], nn.Module],
    ) -> None:
        import deepspeed

        self._rank, self._world = distributed()
        self._training, self._zero_stage, self._device, self._rebuild = training, engine.zero_stage, device, rebuild
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=deepspeed_config(training, engine, precision, self._world),
        )
        self._optimizer: Any = optimizer
        self._dtype = next(p.dtype for p in self._engine.module.parameters() if p.is_floating_point())
        self.edit: Edit = DeepSpeedEdit(self._optimizer)

    def step(self, batch: Batch, learning_rate: float) -> float:
        """Take one optimizer step; each process works on its share of the batch."""
        set_learning_rate(self._optimizer, learning_rate)
        losses = []
        for piece in pieces_of(batch, self._rank, self._world, self._training.gradient_accumulation):
            loss = self._engine(**{key: self._placed(value) for key, value in piece.items()}).loss
            self._engine.backward(loss)
            self._engine.step()
            losses.append(loss.detach())
        return self._over_ranks(mean_loss(losses))

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        """Move an input to the device; numbers (a regression's labels) take the precision of the model."""
        return value.to(self._device, self._dtype if value.is_floating_point() else None)

    def _over_ranks(self, loss: float) -> float:
        """Average over processes, whose shares of a batch are equal."""
        if self._world == 1:
            return loss
        import torch
        from deepspeed import comm

        total = torch.tensor([loss], device=self._device)
        comm.all_reduce(total)
        return float(total) / self._world

    def finish(self) -> nn.Module:
        """Return the trained module (ZeRO-3: gathered into a fresh one)."""
        module: nn.Module = self._engine.module
        if self._zero_stage == 3:
            module = self._gather(module)
        self._engine.destroy()
        return module

    def _gather(self, sharded: nn.Module) -> nn.Module:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
            state = {name: tensor.detach().clone() for name, tensor in sharded.state_dict().items()}
        fresh = self._rebuild().to(self._device)
        fresh.load_state_dict(state)
        return fresh


class TorchLoop:
    """The same steps without an engine: what DeepSpeed is compared with, one process."""

    def __init__(self, model: nn.Module, training: Training, precision: str, device: str) -> None:
        import torch

        self._model, self._training, self._device = model.to(device), training, device
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        makers = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        maker: Any = makers[training.optimizer]
        self._optimizer = maker(self._parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self._autocast = torch.autocast(device.split(":")[0], types.get(precision), enabled=precision != "fp32")
        self.edit: Edit = LocalEdit(self._optimizer)

    def step(self, batch: Batch, learning_rate: float) -> float:
        """Take one optimizer step."""
        import torch

        set_learning_rate(self._optimizer, learning_rate)
        losses = []
        count = self._training.gradient_accumulation
        for piece in pieces_of(batch, 0, 1, count):
            with self._autocast:
                loss = self._model(**{key: value.to(self._device) for key, value in piece.items()}).loss
            (loss / count).backward()
            losses.append(loss.detach())
        if self._training.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._training.gradient_clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return mean_loss(losses)

    def finish(self) -> nn.Module:
        """Return the module, which was trained in place."""
        return self._model


class DeepSpeedEdit(LocalEdit):
    """Reads and writes full parameters through DeepSpeed wherever it holds shards or fp32 masters of its own."""

    def get(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the fp32 master."""
        from deepspeed.utils import safe_get_full_fp32_param

        if not _managed(parameter):
            return super().get(parameter)
        value: torch.Tensor = safe_get_full_fp32_param(parameter)
        return value.detach().clone()

    def set(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Write the parameter and its fp32 master."""
        from deepspeed.utils import safe_set_full_fp32_param

        if _managed(parameter):
            safe_set_full_fp32_param(parameter, value)
        if not hasattr(parameter, "ds_id"):
            super().set(parameter, value)

    def get_state(self, parameter: torch.Tensor, key: str) -> torch.Tensor | None:
        """Return the optimizer state ``key``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not _managed(parameter):
            return super().get_state(parameter, key)
        value = safe_get_full_optimizer_state(parameter, key)
        return None if value is None else value.detach().clone()

    def set_state(self, parameter: torch.Tensor, key: str, value: torch.Tensor) -> None:
        """Write the optimizer state ``key``."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if _managed(parameter):
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            super().set_state(parameter, key, value)


def _managed(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id") or getattr(parameter, "_hp_mapping", None) is not None


def make_loop(
    model: nn.Module,
    training: Training,
    engine: Engine,
    precision: str,
    device: str,
    accelerator: str | None,
    rebuild: Callable[[], nn.Module],
) -> Loop:
    """Start the engine that a run names; raises UnsupportedError where DeepSpeed has no accelerator for the target."""
    if engine.name == "torch":
        return TorchLoop(model, training, precision, device)
    if accelerator is None:
        raise UnsupportedError("DeepSpeed has no accelerator for this target")
    init_deepspeed(accelerator)
    return DeepSpeedLoop(model, training, engine, precision, device, rebuild)


def train(
    loop: Loop,
    model: nn.Module,
    task: Task,
    methods: Sequence[Method],
    training: Training,
    seed: int,
    on_step: Callable[[int, int, float], None],
) -> TrainingRun:
    """Train until the budget ends; calls ``on_step(step, steps, loss)`` after each optimizer step.

    Where ``training.select`` is ``best``, the weights that scored best on the task's selection split after any epoch
    are restored. Raises TrainingError on a loss that is not finite.
    """
    epoch_steps, steps = step_counts(task.size("train"), training)
    best = BestWeights(model, task) if training.select == "best" else None
    run = TrainingRun([], [], 0)
    model.train()
    for step, batch in enumerate(batch_stream(task, training.batch_size, seed, steps), start=1):
        start = time.perf_counter()
        loss = loop.step(batch, training.learning_rate * rate_factor(step, steps, training))
        for method in methods:
            method.after_step(model, step / steps, loop.edit)
        run.step_seconds.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step} of {steps}: try a smaller learning_rate")
        run.curve.append((step, loss))
        run.items += training.batch_size
        on_step(step, steps, loss)
        if best is not None and (step % epoch_steps == 0 or step == steps):
            best.consider(loop.edit)
            model.train()
    if best is not None:
        best.restore(loop.edit)
    return run


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


def step_counts(items: int, training: Training) -> tuple[int, int]:
    """Return (optimizer steps in an epoch, steps in all); an incomplete last batch of an epoch is dropped."""
    epoch = max(1, items // training.batch_size)
    budget = training.budget
    limits = [math.ceil(budget.epochs * epoch)] if budget.epochs is not None else []
    limits += [budget.max_steps] if budget.max_steps is not None else []
    return epoch, min(limits)


def batch_stream(task: Task, batch_size: int, seed: int, steps: int) -> Iterator[Batch]:
    """Yield ``steps`` batches, epoch after epoch, each shuffled by its own seed."""
    given = 0
    epoch = 0
    while given < steps:
        for batch in task.batches("train", batch_size, seed * 1_000_003 + epoch):
            yield batch
            given += 1
            if given == steps:
                return
        epoch += 1


def rate_factor(step: int, steps: int, training: Training) -> float:
    """Factor of the learning rate at ``step`` (from 1): linear warm-up, then linear decay to 0, or constant."""
    warmup = min(training.warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    if training.schedule == "constant":
        return 1.0
    return (steps - step + 1) / (steps - warmup)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def pieces_of(batch: Batch, rank: int, world: int, accumulation: int) -> Iterator[Batch]:
    """Yield the micro-batches of a global batch that belong to ``rank``: equal shares, in order."""
    rows = next(iter(batch.values())).shape[0] // (world * accumulation)
    for piece in range(accumulation):
        start = (piece * world + rank) * rows
        yield {key: value[start : start + rows] for key, value in batch.items()}


def mean_loss(losses: Sequence[torch.Tensor]) -> float:
    """Average the losses of equal micro-batches."""
    import torch

    return float(torch.stack([loss.float() for loss in losses]).mean())
