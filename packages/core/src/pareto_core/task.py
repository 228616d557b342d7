"""The second concept: a task, which has data, a backbone, a score, and says what inference looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pareto_core.config import Config
from pareto_core.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

Split = Literal["train", "dev", "test"]
Batch = dict[str, "torch.Tensor"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """The figure that a task is judged by."""

    name: str
    unit: str = "%"
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """What a method may need to know of a task without loading its data.

    ``head`` names the newly initialised modules that any method must train (None: there are none).
    """

    labels: tuple[str, ...] = ()
    vocabulary_size: int = 0
    max_length: int = 0
    head: tuple[str, ...] = ()
    generates: bool = False


@dataclasses.dataclass(frozen=True)
class Record:
    """The outcome for one item: enough to score, and to resample for paired intervals.

    ``prediction`` and ``label`` are class names, numbers (regression) or texts; ``score`` is a trial's score where the
    task verifies; ``log_probability`` is that of the label under the model, in nats.
    """

    id: str
    prediction: str | float | None = None
    label: str | float | None = None
    log_probability: float | None = None
    text: str | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A paper's fixed way of timing: ``warmups`` untimed calls, then ``runs`` timed ones, all ``repeats`` times."""

    warmups: int
    runs: int
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class Request:
    """One kind of inference: a forward pass or a generation over given inputs.

    ``inputs`` are the keyword arguments of the call, tensors of shape (batch, ...) on the CPU. ``new_tokens`` is the
    exact number generated where ``kind`` is ``generate``. Without ``protocol`` the runner samples adaptively.
    """

    kind: Literal["forward", "generate"]
    inputs: Mapping[str, Any]
    new_tokens: int = 0
    protocol: Protocol | None = None
    description: str = ""

    @property
    def batch_size(self) -> int:
        """Number of items in one call."""
        return int(next(iter(self.inputs.values())).shape[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Config):
    """Base of every task; its fields say which data, which backbone, how long, how many."""

    name: ClassVar[str]
    metric: ClassVar[Metric]
    #: units of the scores that are not percentages, by name
    units: ClassVar[Mapping[str, str]] = {}
    #: the split whose records are scored and reported, and the one that picks a checkpoint
    evaluation_split: ClassVar[Split] = "test"
    selection_split: ClassVar[Split] = "dev"

    @property
    def primary_metric(self) -> Metric:
        """The metric of this configuration (some tasks are families with different metrics)."""
        return self.metric

    @property
    def spec(self) -> TaskSpec:
        """Vocabulary, labels, lengths and the head's name."""
        raise TypeError(f"{type(self).__name__} must define spec")

    def backbone(self) -> nn.Module | Mapping[str, nn.Module] | None:
        """Return a fresh model, several by name, or None where the method brings its own."""
        raise TypeError(f"{type(self).__name__} must define backbone()")

    def frozen_backbone(self) -> nn.Module | Mapping[str, nn.Module] | None:
        """Return :meth:`backbone` with every parameter frozen, as the runner hands it to methods."""
        from pareto_core.weights import freeze

        return freeze(self.backbone())

    def size(self, split: Split) -> int:
        """Number of items of ``split``."""
        raise TypeError(f"{type(self).__name__} must define size(split)")

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield one epoch of ``split``; ``train`` is shuffled by ``seed`` and drops an incomplete last batch."""
        raise TypeError(f"{type(self).__name__} must define batches(split, batch_size, seed)")

    def records(self, model: Any, split: Split) -> list[Record]:
        """Run ``model`` over ``split``: one record per item, in a fixed order."""
        raise TypeError(f"{type(self).__name__} must define records(model, split)")

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Metrics by name, :attr:`primary_metric` among them; raises DataError on no records."""
        raise TypeError(f"{type(self).__name__} must define score(records)")

    def requests(self) -> dict[str, Request]:
        """What inference looks like, by name; may be empty."""
        return {}

    def data_revision(self) -> dict[str, str]:
        """Hashes and versions of the data: results over different ones are not compared."""
        return {}

    def make_ready(self, say: Callable[[str], None]) -> None:
        """Make what is made once on a machine and kept, such as a backbone trained offline; ``say`` takes progress."""

    def relabel(self, records: Sequence[Record]) -> Self:
        """Return this task with its training labels taken from another run's ``records`` (pseudo-labels)."""
        raise UnsupportedError(f"task {self.name} cannot take its labels from another run")
