"""Associative recall: after pairs of keys and values, say which value belongs to a key (§7.4.2, table 7.2).

Two generators are published, and both are here by their rules (the random streams are our own):

- ``safari``: D. Y. Fu et al., "Hungry Hungry Hippos: Towards Language Modeling with State Space Models", 2023,
  https://arxiv.org/abs/2212.14052, the one that table 7.2 rests on. ``vocabulary`` counts everything a model may see: a
  mark for "was not there", ``(V − 2) // 2`` keys, the other values, and the prompt mark; at 10, four keys and four
  values. Each example maps keys to values at random, with repetition; ``length`` tokens are pairs of random keys and
  their values, then come the prompt mark, a key, and its value, which alone is scored: the key is one that occurred,
  or any with ``allow_dot``. A model that has read ``length + 2`` tokens is asked. Every next token trains, as published
  (``train_labels = "final"``: the answer alone).
- ``mqar``: S. Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023,
  https://arxiv.org/abs/2312.04927. ``vocabulary`` counts token 0, which nothing but noise uses, ``V // 2 − 1`` keys and
  the other values. ``pairs`` different keys with different values come first, then each key once more, at gaps that
  follow a power law with exponent ``power_a − 1``; what follows a key there is scored, and what stands there is noise,
  as everywhere between queries.

Deviation: no example occurs twice, in whichever split (published for safari: not twice within a split).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from pareto_core.errors import DataError, ModelError
from pareto_core.task import Batch, Metric, Record, Request, Split, TaskSpec
from pareto_core.tasks.causal import on_device_of
from pareto_core.tasks.text_to_text import IGNORED
from pareto_sequence.tasks.base import BATCH, POSITIONS, SequenceTask, require_batch, revision_of

RULE = "1"
#: examples that are drawn at once, and rounds without a new one after which there are taken to be no more
BLOCK, ROUNDS = 512, 10
Examples = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(SequenceTask):
    """Recall by ``rule``; ``length`` and ``vocabulary`` as the module says, items per split, all drawn by ``seed``."""

    name: ClassVar[str] = "sequence.associative_recall"
    metric: ClassVar[Metric] = Metric("accuracy")
    causal: ClassVar[bool] = True

    rule: Literal["safari", "mqar"] = "safari"
    vocabulary: int = 10
    length: int = 64
    train_items: int = 5000
    dev_items: int = 500
    test_items: int = 500
    seed: int = 0
    train_labels: Literal["published", "final"] = "published"
    allow_dot: bool = False
    pairs: int = 8
    power_a: float = 0.01

    def validate(self) -> None:
        """Check ranges."""
        self.require("length", self.length >= 2 and self.length % 2 == 0, "must be even and at least 2")
        for field in ("train_items", "dev_items", "test_items"):
            self.require(field, getattr(self, field) > 0, "must be above 0")
        self.require("seed", self.seed >= 0, "must not be negative")
        self.require("pairs", self.pairs >= 1, "must be at least 1")
        self.require("power_a", self.power_a > 0, "must be above 0")
        if self.rule == "safari":
            self.require("vocabulary", self.vocabulary >= 6, "must be at least 6: two marks, two keys, two values")
            return
        self.require("train_labels", self.train_labels == "published", "must be 'published' with rule 'mqar'")
        self.require("allow_dot", not self.allow_dot, "must be false with rule 'mqar'")
        self.require("pairs", self.pairs <= self.length // 4, f"must be at most {self.length // 4}, length / 4")
        least = 2 * self.pairs + 2
        self.require("vocabulary", self.vocabulary >= least, f"must be at least {least} for {self.pairs} pairs")

    @property
    def spec(self) -> TaskSpec:
        """The vocabulary, and the length with prompt and answer."""
        return TaskSpec((), self.vocabulary, self.length + (3 if self.rule == "safari" else 0), generates=True)

    def size(self, split: Split) -> int:
        """Number of examples of ``split``."""
        return {"train": self.train_items, "dev": self.dev_items, "test": self.test_items}[split]

    @functools.cached_property
    def _examples(self) -> dict[Split, Examples]:
        return {}

    @functools.cached_property
    def _seen(self) -> set[bytes]:
        return set()

    def _distinct(self, random: np.random.Generator, split: Split, seen: set[bytes]) -> Examples:
        """Draw as many examples as ``split`` has that are not in ``seen``, and put them there."""
        wanted, fruitless = self.size(split), 0
        rows: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        while len(rows) < wanted and fruitless < ROUNDS:
            before = len(rows)
            for row, label in zip(*self._draw(random, BLOCK), strict=True):
                key = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
                if key not in seen and len(rows) < wanted:
                    seen.add(key)
                    rows.append(row)
                    labels.append(label)
            fruitless = fruitless + 1 if len(rows) == before else 0
        if len(rows) < wanted:
            raise DataError(
                f"task {self.name}: found no more than {len(rows)} of {wanted} different examples for {split}; "
                f"ask for fewer, or for a length above {self.length}"
            )
        return np.stack(rows), np.stack(labels)

    def _draw(self, random: np.random.Generator, count: int) -> Examples:
        if self.rule == "safari":
            return safari(random, count, self.vocabulary, self.length, self.allow_dot)
        return mqar(random, count, self.vocabulary, self.length, self.pairs, self.power_a)

    def examples(self, split: Split) -> Examples:
        """Tokens and labels (items, length) of ``split``; a label lies under the token that it is predicted for."""
        # Training comes last: how many items it has changes nothing of the other two.
        order: tuple[Split, ...] = ("test", "dev", "train")
        for number, name in enumerate(order[: order.index(split) + 1]):
            if name not in self._examples:
                random = np.random.default_rng([self.seed, number])
                self._examples[name] = self._distinct(random, name, self._seen)
        return self._examples[split]

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels`` (batch, length) of the examples ``indices``."""
        import torch

        ids, labels = (torch.from_numpy(array[np.asarray(indices)].astype(np.int64)) for array in self.examples(split))
        if split == "train" and self.rule == "safari" and self.train_labels == "published":
            labels = ids.clone()
            labels[:, 0] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield batches of :meth:`collate`; ``train`` is shuffled by ``seed``, its incomplete last batch dropped."""
        total = self.size(split)
        order = np.arange(total)
        if split == "train":
            require_batch(self.name, total, batch_size)
            order = np.random.default_rng(seed).permutation(total)[: total - total % batch_size]
        for start in range(0, len(order), batch_size):
            yield self.collate(split, order[start : start + batch_size].tolist())

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per example: its answers as texts, ``score`` the share that is right.

        Raises :class:`ModelError` where the model gives a probability that is no number.
        """
        import torch

        found: list[Record] = []
        rows = max(1, POSITIONS // self.spec.max_length)
        for start in range(0, self.size(split), rows):
            chunk = range(start, min(start + rows, self.size(split)))
            batch = on_device_of(model, self.collate(split, chunk))
            labels = self.examples(split)[1][chunk.start : chunk.stop]
            del batch["labels"]
            with torch.inference_mode():
                logits = model(**batch).logits
                for number, row, label in zip(chunk, logits, labels, strict=True):
                    places = np.flatnonzero(label != IGNORED)
                    found.append(self._record(f"{split}:{number}", row[places - 1], label[places]))
        return found

    def _record(self, name: str, logits: Any, answers: np.ndarray) -> Record:
        nats = logits.float().log_softmax(-1).cpu().numpy()
        total = float(nats[np.arange(len(answers)), answers].astype(np.float64).sum())
        if not math.isfinite(total):
            raise ModelError(f"task {self.name}: the log-probability of item {name} is {total}")
        predicted = nats.argmax(-1)
        prediction, label = (" ".join(map(str, tokens.tolist())) for tokens in (predicted, answers))
        share = float((predicted == answers).mean())
        return Record(name, prediction, label, log_probability=total, score=share)

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Share of answers that are right, in percent."""
        if not records:
            raise DataError(f"task {self.name}: no records to score")
        return {"accuracy": 100.0 * sum(record.score or 0.0 for record in records) / len(records)}

    def requests(self) -> dict[str, Request]:
        """``forward``: the first test example up to where its answer is asked for; ``forward_batch``: eight of them."""
        inputs = self.collate("test", range(min(BATCH, self.test_items)))
        read = self.length + (2 if self.rule == "safari" else 0)
        inputs = {name: value[:, :read].clone() for name, value in inputs.items() if name != "labels"}
        one = {name: value[:1].clone() for name, value in inputs.items()}
        return {
            "forward": Request("forward", one, description=f"{read} tokens"),
            "forward_batch": Request("forward", inputs, description=f"{len(inputs['input_ids'])} times {read} tokens"),
        }

    def data_revision(self) -> dict[str, str]:
        """The rule's version, and a hash over the fields and the test examples."""
        arrays = b"".join(array.tobytes() for array in self.examples("test"))
        return revision_of(f"{self.rule} {RULE}", self, hashlib.sha256(arrays).hexdigest())


def safari(random: np.random.Generator, count: int, vocabulary: int, length: int, allow_dot: bool = False) -> Examples:
    """Draw ``count`` examples: tokens and labels (count, length + 3) int32, the last label alone not -100.

    Token 0 says that the key was not there, then come the keys, then the values, then the prompt mark.
    """
    keys = (vocabulary - 2) // 2
    values = random.integers(1 + keys, vocabulary - 1, size=(count, keys))
    shown = random.integers(keys, size=(count, length // 2))
    present = np.zeros((count, keys), bool)
    np.put_along_axis(present, shown, True, axis=1)
    # The largest of equally distributed numbers, over the keys that occurred: each is as likely.
    draws = random.random((count, keys))
    asked = np.where(present | allow_dot, draws, -1.0).argmax(1)[:, None]
    answer = np.where(np.take_along_axis(present, asked, 1), np.take_along_axis(values, asked, 1), 0)
    ids = np.empty((count, length + 3), np.int32)
    ids[:, 0:length:2] = 1 + shown
    ids[:, 1:length:2] = np.take_along_axis(values, shown, 1)
    ids[:, length] = vocabulary - 1
    ids[:, length + 1 : length + 2] = 1 + asked
    ids[:, length + 2 :] = answer
    labels = np.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    return ids, labels


def mqar(random: np.random.Generator, count: int, vocabulary: int, length: int, pairs: int, power_a: float) -> Examples:
    """Draw ``count`` examples: tokens and labels (count, length) int32, a label one place after its query."""
    first_value = vocabulary // 2
    keys = 1 + _choices(random, count, first_value - 1, pairs)
    values = first_value + _choices(random, count, vocabulary - first_value, pairs)
    space = (length - 2 * pairs) // 2
    gaps = _choices(random, count, space, pairs, (power_a - 1) * np.log(np.arange(1, space + 1)))
    places = 2 * pairs + 2 * gaps
    ids = random.integers(vocabulary, size=(count, length)).astype(np.int32)
    ids[:, 0 : 2 * pairs : 2] = keys
    ids[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(ids, places, keys.astype(np.int32), axis=1)
    labels = np.full_like(ids, IGNORED)
    np.put_along_axis(labels, places + 1, values.astype(np.int32), axis=1)
    return ids, labels


def _choices(
    random: np.random.Generator, count: int, options: int, chosen: int, log_weights: np.ndarray | float = 0.0
) -> np.ndarray:
    """``count`` rows of ``chosen`` different numbers below ``options``, drawn one after the other by weight.

    The order of weights plus Gumbel noise is that of successive draws without replacement.
    """
    noise = random.gumbel(size=(count, options)) + log_weights
    return np.argsort(-noise, axis=1)[:, :chosen]
