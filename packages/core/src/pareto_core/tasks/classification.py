"""What text-classification tasks share: tokenising, batching, records, requests. A task adds its examples."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from pareto_core.backbones import MINILM, from_pretrained
from pareto_core.errors import DataError
from pareto_core.task import Batch, Protocol, Record, Request, Split, Task, TaskSpec
from pareto_core.tasks.batching import pooled_order

if TYPE_CHECKING:
    import torch
    from torch import nn

#: §4.4.3 of the KronA chapter: batch 1, length 10, 150 warm-ups, 200 timed runs, three repeats
CHAPTER4_PROTOCOL = Protocol(warmups=150, runs=200, repeats=3)
CHAPTER4_LENGTH = 10


@dataclasses.dataclass(frozen=True)
class Example:
    """One item: its text (or pair of texts) and its label, a class name or a number."""

    id: str
    texts: tuple[str, ...]
    label: str | float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """Base of the tasks that classify (or rate) texts with an encoder and a classification head.

    ``model`` is ``minilm``, a hub name or a directory; texts are cut at ``max_length`` tokens; ``train_items`` keeps
    the first so many training items of a fixed shuffle. A subclass defines :meth:`examples` and :attr:`labels`; labels
    are empty where the task is a regression.
    """

    model: str = MINILM
    data: str | None = None
    max_length: int = 128
    train_items: int | None = None

    def validate(self) -> None:
        """Check ranges."""
        self.require("max_length", 4 <= self.max_length <= 512, "must be between 4 and 512")
        self.require("train_items", self.train_items is None or self.train_items > 0, "must be above 0")

    def examples(self, split: Split) -> list[Example]:
        """Return the items of ``split`` in a fixed order."""
        raise TypeError(f"{type(self).__name__} must define examples(split)")

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; empty for a regression."""
        raise TypeError(f"{type(self).__name__} must define labels")

    @functools.cached_property
    def _splits(self) -> dict[Split, list[Example]]:
        return {}

    def split(self, split: Split) -> list[Example]:
        """Return :meth:`examples`, read once, with ``train`` cut to ``train_items``; raises DataError where empty."""
        if split not in self._splits:
            found = self.examples(split)
            if not found:
                raise DataError(f"task {self.name}: the {split} split is empty")
            if split == "train" and self.train_items is not None:
                found = sorted(found, key=lambda e: hashlib.sha256(e.id.encode()).digest())[: self.train_items]
            self._splits[split] = found
        return self._splits[split]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer."""
        from transformers import AutoTokenizer

        tokenizer = from_pretrained(AutoTokenizer, self.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def backbone(self) -> nn.Module:
        """Return the pre-trained encoder with a new classification head, in fp32."""
        import torch
        from transformers import AutoModelForSequenceClassification

        options: dict[str, Any] = {"num_labels": len(self.labels) or 1, "dtype": torch.float32}
        if self.labels:
            options["id2label"] = dict(enumerate(self.labels))
            options["label2id"] = {label: i for i, label in enumerate(self.labels)}
        else:
            options["problem_type"] = "regression"
        model = from_pretrained(AutoModelForSequenceClassification, self.model, **options)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        assert isinstance(model, torch.nn.Module)
        return model

    @functools.cached_property
    def _spec(self) -> TaskSpec:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = from_pretrained(AutoConfig, self.model)
        auto: Any = AutoModelForSequenceClassification
        with torch.device("meta"):
            skeleton = auto.from_config(config)
        children = [(n, c) for n, c in skeleton.named_children() if n != skeleton.base_model_prefix]
        head = tuple(name for name, child in children if any(True for _ in child.parameters()))
        return TaskSpec(self.labels, int(config.vocab_size), self.max_length, head)

    @property
    def spec(self) -> TaskSpec:
        """Labels, lengths and the modules beside the encoder, which are the head."""
        return self._spec

    def size(self, split: Split) -> int:
        """Number of items of ``split``."""
        return len(self.split(split))

    def model_texts(self, example: Example) -> tuple[str, ...]:
        """Return the text, or the pair of texts, that the model reads of ``example``."""
        return example.texts

    @functools.cached_property
    def _encoded(self) -> dict[Split, list[list[int]]]:
        return {}

    def encoded(self, split: Split) -> list[dict[str, list[int]]]:
        """Token ids of each item of ``split`` (not padded), made once."""
        cache: dict[Split, Any] = self._encoded
        if split not in cache:
            texts = [self.model_texts(example) for example in self.split(split)]
            columns = [list(column) for column in zip(*texts, strict=True)]
            tokens = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
            cache[split] = [dict(zip(tokens, row, strict=True)) for row in zip(*tokens.values(), strict=True)]
        found: list[dict[str, list[int]]] = cache[split]
        return found

    def label_tensor(self, examples: Sequence[Example]) -> torch.Tensor:
        """Labels as class numbers, or as numbers where the task is a regression; shape (batch,)."""
        import torch

        if not self.labels:
            return torch.tensor([float(e.label) for e in examples])
        numbers = {label: number for number, label in enumerate(self.labels)}
        return torch.tensor([numbers[str(e.label)] for e in examples])

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        """Pad the items ``indices`` of ``split`` to the longest (a multiple of 8): tensors of shape (batch, length)."""
        encoded, examples = self.encoded(split), self.split(split)
        padded = self.tokenizer.pad(
            [encoded[i] for i in indices], padding=True, pad_to_multiple_of=8, return_tensors="pt"
        )
        return {**padded, "labels": self.label_tensor([examples[i] for i in indices])}

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield padded batches with ``labels``; ``train`` is shuffled by ``seed``, its incomplete last batch dropped.

        Raises :class:`DataError` where the training split has fewer items than one batch.
        """
        total = self.size(split)
        if split == "train" and total < batch_size:
            raise DataError(f"task {self.name}: {total} training items do not fill one batch of {batch_size}")
        order = list(range(total))
        if split == "train":
            lengths = [len(tokens["input_ids"]) for tokens in self.encoded("train")]
            order = pooled_order(lengths, batch_size, seed)
        for start in range(0, len(order), batch_size):
            yield self.collate(split, order[start : start + batch_size])

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per item in the split's order; items of similar length are run together."""
        import torch

        encoded, examples = self.encoded(split), self.split(split)
        order = sorted(range(len(examples)), key=lambda i: len(encoded[i]["input_ids"]))
        device = next((p.device for p in model.parameters()), "cpu") if hasattr(model, "parameters") else "cpu"
        found: dict[int, Record] = {}
        with torch.inference_mode():
            for start in range(0, len(order), 64):
                chunk = order[start : start + 64]
                batch = {key: value.to(device) for key, value in self.collate(split, chunk).items()}
                found.update(zip(chunk, self.batch_records(model, batch, [examples[i] for i in chunk]), strict=True))
        return [found[i] for i in range(len(examples))]

    def batch_records(self, model: Any, batch: Batch, examples: Sequence[Example]) -> list[Record]:
        """Run ``model`` on one collated batch, already on its device: one record per example."""
        logits = model(**batch).logits.float().cpu()
        return [self._record(example, row) for example, row in zip(examples, logits, strict=True)]

    def _record(self, example: Example, logits: torch.Tensor) -> Record:
        if not self.labels:
            value = float(logits[0])
            return Record(example.id, value if math.isfinite(value) else 0.0, float(example.label))
        log_probabilities = logits.log_softmax(-1)
        number = self.labels.index(str(example.label))
        prediction = self.labels[int(log_probabilities.argmax())]
        return Record(example.id, prediction, example.label, float(log_probabilities[number]))

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Accuracy in percent, and that of always answering the most frequent label."""
        if not records:
            raise DataError(f"task {self.name}: no records to score")
        right = sum(r.prediction == r.label for r in records)
        counts = [sum(r.label == label for r in records) for label in {r.label for r in records}]
        total = len(records)
        return {"accuracy": 100.0 * right / total, "majority_accuracy": 100.0 * max(counts) / total}

    def requests(self) -> dict[str, Request]:
        """One text, 32 texts (both real, of the test split), and the chapter's protocol on random tokens."""
        lengths = [len(tokens["input_ids"]) for tokens in self.encoded("test")]
        order = sorted(range(len(lengths)), key=lambda i: (abs(lengths[i] - statistics.median(lengths)), i))
        return {
            "batch1": Request("forward", self._inputs(order[:1]), description="one text of median length"),
            "batch32": Request("forward", self._inputs(list(range(min(32, len(order))))), description="32 texts"),
            "chapter4": Request(
                "forward",
                self._dummy(),
                protocol=CHAPTER4_PROTOCOL,
                description="§4.4.3: batch 1, 10 random tokens",
            ),
        }

    def _inputs(self, indices: Sequence[int]) -> dict[str, Any]:
        return {key: value for key, value in self.collate("test", indices).items() if key != "labels"}

    def _dummy(self) -> dict[str, Any]:
        import torch

        shape = (1, CHAPTER4_LENGTH)
        ids = torch.randint(0, self.spec.vocabulary_size, shape, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long)}

    def data_revision(self) -> dict[str, str]:
        """Hash over ids, texts and labels of every split, and the backbone's name."""
        digest = hashlib.sha256()
        for split in ("train", "dev", "test"):
            for example in self.split(split):
                digest.update(json.dumps([split, example.id, example.texts, example.label]).encode())
        return {"sha256": digest.hexdigest(), "backbone": self.model}

    def relabel(self, records: Sequence[Record]) -> Self:
        """Return this task with the training labels that ``records`` predict; every training item needs one."""
        predictions = {record.id: record.prediction for record in records}
        relabelled = []
        for example in self.split("train"):
            label = predictions.get(example.id)
            if label is None:
                raise DataError(f"task {self.name}: no predicted label for the training item {example.id}")
            relabelled.append(dataclasses.replace(example, label=label))
        task = dataclasses.replace(self)
        task._splits["train"] = relabelled
        return task
