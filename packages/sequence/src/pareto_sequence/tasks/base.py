"""What the tasks over sequences share: each says what its inputs are, and the method makes the model for it.

A batch holds ``input_ids`` (batch, length) int64, or ``input_values`` (batch, length) float32, padded on the right, and
``attention_mask`` (batch, length), 1 at what counts. Pairs have ``input_ids_2`` and ``attention_mask_2`` too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from pareto_core.errors import DataError, ModelError
from pareto_core.task import Batch, Metric, Record, Request, Split, Task
from pareto_core.tasks.batching import pooled_order
from pareto_core.tasks.causal import on_device_of

if TYPE_CHECKING:
    import torch

Inputs = Literal["tokens", "values", "pairs"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
#: positions that a model is given at once when records are made
POSITIONS = 2**14
#: items of the request ``forward_batch``
BATCH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceTask(Task):
    """Base of the tasks whose models are made anew: ``inputs`` says what a model reads, ``causal`` how.

    A causal task is language modelling: ``labels`` (batch, length) lie under ``input_ids``, -100 where nothing is
    scored, and the model predicts each from what stands before it. The others are classifications.
    """

    inputs: ClassVar[Inputs] = "tokens"
    causal: ClassVar[bool] = False

    def backbone(self) -> None:
        """Return None: a method makes its own model from :attr:`spec`."""
        return None


@dataclasses.dataclass(frozen=True)
class Items:
    """Sequences with their classes: ``rows[i]`` holds tokens (above 0), or values that are multiplied by ``scale``.

    ``lengths`` are those of the rows, for pairs those of the longer of ``rows[i]`` and ``second[i]``. Rows may be read
    only when they are asked for.
    """

    rows: Sequence[np.ndarray] | np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    second: Sequence[np.ndarray] | None = None
    scale: float = 1.0

    def digest(self, count: int) -> str:
        """Return the sha256 over the first ``count`` rows and their labels."""
        found = hashlib.sha256()
        for number in range(min(count, len(self.labels))):
            for rows in (self.rows, self.second or ()):
                if len(rows):
                    found.update(np.ascontiguousarray(rows[number]).astype(np.int64).tobytes())
            found.update(int(self.labels[number]).to_bytes(8, "little"))
        return found.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceClassification(SequenceTask):
    """Base of the tasks that put a sequence, or a pair of them, into one of the classes that :attr:`spec` names.

    A subclass defines :meth:`read`. Items are named ``split:number``.
    """

    metric: ClassVar[Metric] = Metric("accuracy")

    def read(self, split: Split) -> Items:
        """Return the items of ``split`` in a fixed order."""
        raise TypeError(f"{type(self).__name__} must define read(split)")

    @functools.cached_property
    def _items(self) -> dict[Split, Items]:
        return {}

    def items(self, split: Split) -> Items:
        """Return :meth:`read`, done once; raises :class:`DataError` where the split is empty."""
        if split not in self._items:
            found = self.read(split)
            if not len(found.labels):
                raise DataError(f"task {self.name}: the {split} split is empty")
            self._items[split] = found
        return self._items[split]

    def size(self, split: Split) -> int:
        """Number of items of ``split``."""
        return len(self.items(split).labels)

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        """Inputs and ``labels`` (batch,) of the items ``indices``, padded on the right to the longest of them."""
        import torch

        items = self.items(split)
        labels = torch.from_numpy(items.labels[np.asarray(indices)].astype(np.int64))
        if self.inputs == "values":
            values = np.stack([items.rows[i] for i in indices]).astype(np.float32) * np.float32(items.scale)
            rows = torch.from_numpy(values)
            return {"input_values": rows, "attention_mask": torch.ones(rows.shape, dtype=torch.long), "labels": labels}
        batch = padded([items.rows[i] for i in indices])
        if items.second is not None:
            other = padded([items.second[i] for i in indices])
            batch |= {f"{name}_2": value for name, value in other.items()}
        return {**batch, "labels": labels}

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield batches of :meth:`collate`; ``train`` is shuffled by ``seed``, its incomplete last batch dropped.

        Items of similar length share a batch. Raises :class:`DataError` where training items do not fill one batch.
        """
        total = self.size(split)
        order = list(range(total))
        if split == "train":
            require_batch(self.name, total, batch_size)
            order = pooled_order(self.items(split).lengths.tolist(), batch_size, seed)
        for start in range(0, len(order), batch_size):
            yield self.collate(split, order[start : start + batch_size])

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per item in the split's order; :class:`ModelError` where a logit is no number."""
        import torch

        items = self.items(split)
        found: dict[int, Record] = {}
        with torch.inference_mode():
            for chunk in bounded(items.lengths):
                batch = on_device_of(model, self.collate(split, chunk))
                batch.pop("labels")
                logits = model(**batch).logits.float().cpu()
                found.update((i, self._record(split, i, row)) for i, row in zip(chunk, logits, strict=True))
        return [found[i] for i in range(len(items.labels))]

    def _record(self, split: Split, number: int, logits: torch.Tensor) -> Record:
        label = int(self.items(split).labels[number])
        nats = logits.log_softmax(-1)
        if not math.isfinite(float(nats[label])):
            raise ModelError(f"task {self.name}: the log-probability of item {split}:{number} is {float(nats[label])}")
        names = self.spec.labels
        return Record(f"{split}:{number}", names[int(nats.argmax())], names[label], float(nats[label]))

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Accuracy in percent, and that of always answering the most frequent label."""
        if not records:
            raise DataError(f"task {self.name}: no records to score")
        right = sum(record.prediction == record.label for record in records)
        labels = [record.label for record in records]
        frequent = max(labels.count(label) for label in set(labels))
        return {"accuracy": 100.0 * right / len(records), "majority_accuracy": 100.0 * frequent / len(records)}

    def requests(self) -> dict[str, Request]:
        """``forward``: the test item of median length; ``forward_batch``: the first eight."""
        lengths = self.items("test").lengths
        middle = int(np.argsort(lengths, kind="stable")[(len(lengths) - 1) // 2])
        first = list(range(min(BATCH, len(lengths))))
        return {
            "forward": Request("forward", self._inputs([middle]), description=f"{lengths[middle]} positions"),
            "forward_batch": Request("forward", self._inputs(first), description=f"{len(first)} items"),
        }

    def _inputs(self, indices: Sequence[int]) -> Mapping[str, Any]:
        return {name: value for name, value in self.collate("test", indices).items() if name != "labels"}


def padded(rows: Sequence[np.ndarray]) -> Batch:
    """``input_ids`` and ``attention_mask`` (batch, longest row), token 0 in the padding."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = torch.from_numpy(np.asarray(row).astype(np.int64))
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def bounded(lengths: np.ndarray) -> Iterator[list[int]]:
    """Yield the numbers of all items by length, in runs that :data:`POSITIONS` bounds once they are padded."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * int(lengths[order[stop]]) <= POSITIONS:
            stop += 1
        yield order[start:stop].tolist()
        start = stop


def require_batch(task: str, items: int, batch_size: int) -> None:
    """Raise :class:`DataError` where ``items`` training items do not fill one batch."""
    if items < batch_size:
        raise DataError(f"task {task}: {items} training items do not fill one batch of {batch_size}")


def held_out(total: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split ``total`` items at random by ``seed``: sorted numbers of those that remain, and of the ``share`` kept out.

    At least one is kept out. Raises :class:`DataError` where fewer than two are there.
    """
    if total < 2:
        raise DataError(f"{total} items cannot be split in two")
    order = np.random.default_rng(seed).permutation(total)
    count = min(total - 1, max(1, round(share * total)))
    return np.sort(order[count:]), np.sort(order[:count])


def revision_of(rule: str, task: Task, sample: str) -> dict[str, str]:
    """What generated data are: the version of their ``rule``, the task's fields, and the hash of a ``sample``."""
    content = f"{rule}\n{task.canonical()}\n{sample}"
    return {"rule": rule, "sha256": hashlib.sha256(content.encode()).hexdigest()}
