"""The task and the method of the self-test: they go through the runner like any other, and know what it should report.

Their model does just what it is asked for, and writes down what its own clock and counters saw. The instruments are
held against these facts, not against the plan: a sleep of 1 ms takes longer, and on a busy machine much longer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pareto_core import Batch, Method, Metric, Record, Request, Split, Task, TaskSpec
from pareto_core.cache import write_json
from pareto_runner.selftest.work import NAMES, REQUESTS, STEPS, Work, Workload

if TYPE_CHECKING:
    from torch import nn

TRAINING_STEPS, TEST_ITEMS = 12, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfTestTask(Task):
    """Synthetic, with nothing to learn: its requests are pieces of work of known length."""

    name: ClassVar[str] = "selftest.workload"
    metric: ClassVar[Metric] = Metric("accuracy")

    workload: Workload = "host"

    @property
    def spec(self) -> TaskSpec:
        """One class."""
        return TaskSpec(labels=("yes",))

    def backbone(self) -> None:
        """The method brings the model."""

    def size(self, split: Split) -> int:
        """Items of a split."""
        return STEPS["train"].batch_size * TRAINING_STEPS if split == "train" else TEST_ITEMS

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield ``request`` (items, 1) and ``labels`` (items,)."""
        import torch

        name = "train" if split == "train" else "probe"
        for _ in range(self.size(split) // batch_size or 1):
            yield {"request": _ask(name, batch_size), "labels": torch.zeros(batch_size)}

    def records(self, model: Any, split: Split) -> list[Record]:
        """One call and one right answer for each item."""
        found = []
        for number in range(self.size(split)):
            model(request=_ask("evaluate", 1))
            found.append(Record(str(number), "yes", "yes"))
        return found

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Accuracy in percent."""
        return {"accuracy": 100.0 * sum(r.prediction == r.label for r in records) / len(records)}

    def requests(self) -> dict[str, Request]:
        """The pieces of work of this workload."""
        return {name: _request(name, work) for name, work in REQUESTS[self.workload].items()}


def _request(name: str, work: Work) -> Request:
    inputs = {"request": _ask(name, work.batch_size)}
    return Request("generate" if work.tokens else "forward", inputs, new_tokens=work.tokens)


def _ask(name: str, items: int) -> Any:
    import torch

    return torch.full((items, 1), NAMES.index(name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfTestMethod(Method):
    """Builds the model of a workload, which keeps its diary in the directory ``log``.

    ``matmuls`` is how much the workload ``compute`` does in a call.
    """

    log: str
    matmuls: int = 10

    def build(
        self, task: Task, model: nn.Module | Mapping[str, nn.Module] | None = None, teacher: nn.Module | None = None
    ) -> nn.Module:
        """Return a fresh model."""
        assert isinstance(task, SelfTestTask)
        return self._model(task.workload)

    def save(self, deployed: Any, directory: Path) -> None:
        """Write which workload it is: there are no weights to keep."""
        write_json(directory / "model.json", {"workload": deployed.workload})

    def load(self, directory: Path) -> Any:
        """Make the model again."""
        from pareto_runner.selftest.models import HostModel

        model = self._model(json.loads((directory / "model.json").read_text())["workload"])
        if isinstance(model, HostModel):
            model.note_loading()
        return model.eval()

    def _model(self, workload: Workload) -> nn.Module:
        from pareto_runner.selftest.models import ComputeModel, CudaModel, DeviceModel, HostModel

        if workload == "compute":
            return ComputeModel(self.matmuls)
        kinds = {"host": HostModel, "device": DeviceModel, "cuda": CudaModel}
        return kinds[workload](Path(self.log))
