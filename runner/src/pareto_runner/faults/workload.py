"""A task and a method that misbehave when a file tells them to: small, real training that starts in two seconds.

The environment variable ``PARETO_FAULT`` names a JSON file ``{"phase": ..., "action": ..., "after": n}``. At the
``n``-th time that this phase is reached the file is taken away and the action follows: once, so that a later run ends
well.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from pareto_core import Batch, DataError, Edit, Method, Metric, Paper, Record, Request, Split, Task, TaskSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

PHASES = ("prepare", "build", "train", "evaluate", "finish", "save", "load", "call")
ACTIONS = ("kill", "exit", "hang", "memory", "raise", "nan")
LENGTH, CLASSES = 16, 2

_reached: dict[str, int] = {}


def strike(phase: str) -> str:
    """Take the action that is asked for, if this is the time; returns it where it is the caller's to do."""
    path = Path(os.environ.get("PARETO_FAULT", ""))
    if not path.is_file():
        return ""
    asked = json.loads(path.read_text())
    _reached[phase] = _reached.get(phase, 0) + 1
    if asked["phase"] != phase or _reached[phase] != asked["after"]:
        return ""
    try:
        path.rename(path.with_suffix(".taken"))
    except FileNotFoundError:  # another worker was faster
        return ""
    action = str(asked["action"])
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "exit":
        os._exit(7)
    elif action == "hang":
        threading.Event().wait()
    elif action == "memory":
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(2**20)) * 16)
    elif action == "raise":
        raise RuntimeError("a fault that nobody foresaw")
    return action


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultyTask(Task):
    """Synthetic: is the sum of the inputs positive? On a linear layer."""

    name: ClassVar[str] = "faults.workload"
    metric: ClassVar[Metric] = Metric("accuracy")

    items: int = 256

    @property
    def spec(self) -> TaskSpec:
        """Two classes."""
        return TaskSpec(labels=("no", "yes"), max_length=LENGTH)

    def backbone(self) -> nn.Module:
        """Return a linear classifier, the same each time."""
        return make_model()

    def size(self, split: Split) -> int:
        """Every split has the same number of items."""
        return self.items

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield ``inputs`` of shape (batch, 16) and ``labels`` of shape (batch,)."""
        import torch

        generator = torch.Generator().manual_seed({"train": 1, "dev": 2, "test": 3}[split])
        inputs = torch.randn(self.items, LENGTH, generator=generator)
        order = torch.arange(self.items)
        if split == "train":
            order = torch.randperm(self.items, generator=torch.Generator().manual_seed(seed))
        for chunk in order.split(batch_size):
            if split != "train" or len(chunk) == batch_size:
                yield {"inputs": inputs[chunk], "labels": (inputs[chunk].sum(1) > 0).long()}

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per item."""
        import torch

        strike("evaluate")
        [batch] = self.batches(split, self.items, 0) if split != "train" else [next(self.batches(split, self.items, 0))]
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(-1)
        names = self.spec.labels
        pairs = zip(predictions.tolist(), batch["labels"].tolist(), strict=True)
        return [Record(str(i), names[guess], names[truth]) for i, (guess, truth) in enumerate(pairs)]

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Accuracy in percent."""
        if not records:
            raise DataError("no records to score")
        return {"accuracy": 100.0 * sum(r.prediction == r.label for r in records) / len(records)}

    def requests(self) -> dict[str, Request]:
        """One item."""
        batch = next(self.batches("test", 1, 0))
        return {"batch1": Request("forward", {"inputs": batch["inputs"]})}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultyMethod(Method):
    """Trains the whole linear layer, and passes through :func:`strike` in every phase."""

    paper: ClassVar[Paper | None] = None

    def prepare(self, task: Task) -> None:
        """Nothing but the fault."""
        strike("prepare")

    def build(
        self, task: Task, model: nn.Module | Mapping[str, nn.Module] | None = None, teacher: nn.Module | None = None
    ) -> nn.Module:
        """Unfreeze everything."""
        strike("build")
        return self.starting_model(task, model).requires_grad_(True)

    def after_step(self, model: nn.Module, progress: float, edit: Edit) -> None:
        """Make the weights NaN where that is the fault."""
        import torch

        if strike("train") == "nan":
            for parameter in model.parameters():
                edit.set(parameter, torch.full_like(parameter, float("nan")))

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        """Nothing but the fault."""
        strike("finish")
        return model

    def save(self, deployed: Any, directory: Path) -> None:
        """Write the weights as safetensors."""
        from safetensors.torch import save_file

        strike("save")
        directory.mkdir(parents=True, exist_ok=True)
        save_file(deployed.state_dict(), directory / "model.safetensors")

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote."""
        from safetensors.torch import load_file

        strike("load")
        model = make_model()
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return model.eval()


def make_model() -> nn.Module:
    """Return the linear classifier: ``inputs`` of shape (batch, 16) to logits of shape (batch, 2), and the loss."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(LENGTH, CLASSES)

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
            if torch.is_inference_mode_enabled() and "turns" in sys.argv:
                strike("call")
            logits = self.classifier(inputs)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return SimpleNamespace(logits=logits, loss=loss)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier()
