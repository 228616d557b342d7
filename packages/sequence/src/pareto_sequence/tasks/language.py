"""Language modelling over one long text: what tasks share that predict each token from those before it.

Windows of dev and test overlap by one token, which the first window predicts and the second starts from: each token of
a split but its first is scored exactly once, and a window still has the length that it was asked for, so that it fills
chunks of attention exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pareto_core.errors import DataError, ModelError
from pareto_core.task import Batch, Metric, Record, Request, Split
from pareto_core.tasks.byte_text import prompt_requests
from pareto_core.tasks.causal import on_device_of, target_nats
from pareto_core.tasks.text_to_text import IGNORED
from pareto_sequence.tasks.base import POSITIONS, SequenceTask, padded, require_batch

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling(SequenceTask):
    """Base of the tasks that are scored in bits per token of one text.

    ``items`` keeps the first so many windows of dev and of test in an order drawn by hash. ``prompt`` and
    ``new_tokens`` are the lengths of the request ``generate``, ``long_prompt`` that of the prompt of ``generate_long``;
    prompts are cut to what leaves room for the new tokens in a window. A subclass defines :meth:`text`,
    :attr:`train_lengths` and :attr:`window_length`; no token of its text that is :attr:`silent` is scored.
    """

    metric: ClassVar[Metric] = Metric("bits_per_byte", unit="bits", higher_is_better=False)
    causal: ClassVar[bool] = True
    silent: ClassVar[int] = -1

    items: int | None = None
    prompt: int = 32
    new_tokens: int = 32
    long_prompt: int = 512

    def validate(self) -> None:
        """Check ranges."""
        self.require("items", self.items is None or self.items > 0, "must be above 0")
        for field in ("prompt", "long_prompt"):
            self.require(field, getattr(self, field) > 0, "must be above 0")
        self.require("new_tokens", self.new_tokens > 1, "must be above 1")

    def text(self, split: Split) -> np.ndarray:
        """Tokens (length,) of ``split``."""
        raise TypeError(f"{type(self).__name__} must define text(split)")

    @property
    def train_lengths(self) -> tuple[int, ...]:
        """Lengths that training windows have, in rising order; each batch has one of them, all are as frequent."""
        raise TypeError(f"{type(self).__name__} must define train_lengths")

    @property
    def window_length(self) -> int:
        """Length of the windows of dev and test (the last one may be shorter)."""
        raise TypeError(f"{type(self).__name__} must define window_length")

    @functools.cached_property
    def _windows(self) -> dict[Split, list[tuple[int, int]]]:
        return {}

    def windows(self, split: Split) -> list[tuple[int, int]]:
        """Start and stop of each window of ``split`` (dev or test); DataError where there are not two tokens."""
        if split not in self._windows:
            total, step = len(self.text(split)), self.window_length - 1
            if total < 2:
                raise DataError(f"task {self.name}: {total} tokens of {split} leave nothing to predict")
            found = [(start, min(start + step + 1, total)) for start in range(0, total - 1, step)]
            if self.items is not None:
                order = sorted(range(len(found)), key=lambda n: hashlib.sha256(f"{split}:{n}".encode()).digest())
                found = [found[n] for n in sorted(order[: self.items])]
            self._windows[split] = found
        return self._windows[split]

    def size(self, split: Split) -> int:
        """Number of windows of ``split``; in training, as many of the mean length as its text fills."""
        if split != "train":
            return len(self.windows(split))
        return len(self.text(split)) * len(self.train_lengths) // sum(self.train_lengths)

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield ``input_ids``, ``attention_mask`` and ``labels``, all of shape (batch, length).

        An epoch of ``train`` cuts the text, from a random place on, into windows of random lengths that do not overlap;
        those of a batch have one length. Labels are -100 at the first token of a window, at silent tokens and padding.
        """
        if split == "train":
            yield from self._train_batches(batch_size, seed)
            return
        windows = self.windows(split)
        for start in range(0, len(windows), batch_size):
            yield self._batch(split, windows[start : start + batch_size])

    def _train_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        total = self.size("train")
        require_batch(self.name, total, batch_size)
        random = np.random.default_rng(seed)
        # As many batches as size // batch_size promises. Short lengths come first in each round over the lengths, so
        # that an incomplete round does not need more text than there is.
        lengths = np.resize(self.train_lengths, total // batch_size)
        random.shuffle(lengths)
        every = np.repeat(lengths, batch_size)
        place = random.permutation(len(every))
        stops = np.empty_like(every)
        stops[place] = np.cumsum(every[place])
        stops += random.integers(len(self.text("train")) - int(stops.max()) + 1)
        for start in range(0, len(every), batch_size):
            chosen = range(start, start + batch_size)
            yield self._batch("train", [(int(stops[i] - every[i]), int(stops[i])) for i in chosen])

    def _batch(self, split: Split, windows: Sequence[tuple[int, int]]) -> Batch:
        text = self.text(split)
        batch = padded([text[start:stop] for start, stop in windows])
        ids = batch["input_ids"]
        labels = ids.masked_fill((batch["attention_mask"] == 0) | (ids == self.silent), IGNORED)
        labels[:, 0] = IGNORED
        return {**batch, "labels": labels}

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per window: ``log_probability`` of its scored tokens in nats, ``label`` their number.

        Raises :class:`ModelError` where the model gives a probability that is no number.
        """
        import torch

        windows = self.windows(split)
        rows = max(1, POSITIONS // self.window_length)
        found: list[Record] = []
        for start in range(0, len(windows), rows):
            batch = on_device_of(model, self._batch(split, windows[start : start + rows]))
            labels = batch.pop("labels")
            with torch.inference_mode():
                nats = target_nats(model(**batch).logits, labels)
            found += [
                self._record(split, len(found) + i, *pair) for i, pair in enumerate(zip(nats, labels, strict=True))
            ]
        return found

    def _record(self, split: Split, number: int, nats: float, labels: torch.Tensor) -> Record:
        if not math.isfinite(nats):
            raise ModelError(f"task {self.name}: the log-probability of window {split}:{number} is {nats}")
        return Record(f"{split}:{number}", label=float((labels != IGNORED).sum()), log_probability=nats)

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Bits per token over all records, under the metric's name."""
        count = sum(float(record.label or 0.0) for record in records)
        if not count:
            raise DataError(f"task {self.name}: no records to score")
        nats = -sum(record.log_probability or 0.0 for record in records)
        return {self.metric.name: nats / math.log(2) / count}

    def requests(self) -> dict[str, Request]:
        """``forward``: the first test window; ``generate`` and ``generate_long``: its first tokens, continued."""
        tokens = self._batch("test", self.windows("test")[:1])["input_ids"][0]
        window = Request("forward", {"input_ids": tokens[None]}, description=f"{len(tokens)} tokens")
        tokens = tokens[tokens != self.silent]
        room = len(tokens) - self.new_tokens
        if room < 1:
            raise DataError(
                f"task {self.name}: a test window of {len(tokens)} tokens has no room for new_tokens {self.new_tokens}"
            )
        lengths: Mapping[str, int] = {"": min(self.prompt, room), "_long": min(self.long_prompt, room)}
        found = prompt_requests(tokens, lengths, self.new_tokens)
        return {"forward": window, **{name: asked for name, asked in found.items() if asked.kind == "generate"}}
