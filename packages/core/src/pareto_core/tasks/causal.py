"""Generation by a causal language model: it continues a prompt, and any of several references would have been right.

A training sequence is the prompt, a space and the text, and the end mark; the loss counts the text and the end mark
alone. A text is one line: line breaks in references become spaces, and of what is generated the first line counts.

A task derives from :class:`CausalGeneration` and defines :meth:`~CausalGeneration.items` and ``score``; it knows
nothing of tokens. Prompts that end without white space suit byte-pair tokenizers, whose words start with a space.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pareto_core.backbones import from_pretrained, resolve, revision
from pareto_core.errors import DataError, ModelError
from pareto_core.task import Batch, Record, Request, Split, Task, TaskSpec
from pareto_core.tasks.batching import pooled_order
from pareto_core.tasks.text_to_text import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import nn

#: sequences that are generated together, beams included
SEQUENCES = 64
#: items whose log-probabilities are computed together: logits over 50,000 tokens are large
ROWS = 16


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and the texts that answer it; training, and the log-probability of a record, take the first."""

    id: str
    prompt: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens of an item: its prompt, and its first reference with the end mark."""

    prompt: list[int]
    target: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalGeneration(Task):
    """Base of the tasks in which a causal language model continues a prompt.

    ``model`` is ``tiny-gpt2``, a hub name or a directory. Prompt and text together are cut at ``max_length`` tokens (or
    at the model's positions, if those are fewer): the text at ``max_new_tokens``, end mark included, the prompt at what
    remains, from its start. ``train_items`` keeps the first so many training items of a fixed shuffle, ``test_items``
    those of dev and of test. Records are generated greedily (``num_beams`` 1) or by beam search, in which a sequence's
    log-probability is divided by its length to the power of ``length_penalty``.
    """

    model: str = "openai-community/gpt2-medium"
    data: str | None = None
    max_length: int = 512
    max_new_tokens: int = 64
    train_items: int | None = None
    test_items: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0

    def validate(self) -> None:
        """Check ranges."""
        self.require("max_new_tokens", self.max_new_tokens > 0, "must be above 0")
        self.require(
            "max_length", self.max_length > self.max_new_tokens, f"must be above max_new_tokens {self.max_new_tokens}"
        )
        for field in ("train_items", "test_items"):
            value = getattr(self, field)
            self.require(field, value is None or value > 0, "must be above 0")
        self.require("num_beams", 1 <= self.num_beams <= SEQUENCES, f"must be from 1 to {SEQUENCES}")
        self.require("length_penalty", self.length_penalty >= 0, "must not be negative")

    def items(self, split: Split) -> list[Item]:
        """Return the items of ``split`` in a fixed order; ids differ between splits too. For a subclass to define."""
        raise TypeError(f"{type(self).__name__} must define items(split)")

    @functools.cached_property
    def _splits(self) -> dict[Split, list[Item]]:
        return {}

    def split(self, split: Split) -> list[Item]:
        """Return :meth:`items`, read once and cut to the number asked for; raises DataError where empty."""
        if split not in self._splits:
            found = self.items(split)
            if not found:
                raise DataError(f"task {self.name}: the {split} split is empty")
            kept = self.train_items if split == "train" else self.test_items
            if kept is not None:
                found = sorted(found, key=lambda item: hashlib.sha256(item.id.encode()).digest())[:kept]
            self._splits[split] = found
        return self._splits[split]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; the end mark pads where it has no padding token."""
        from transformers import AutoTokenizer

        tokenizer = from_pretrained(AutoTokenizer, self.model)
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {self.model!r} has no end mark: nothing would end a generated text")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @functools.cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return from_pretrained(AutoConfig, self.model)

    @functools.cached_property
    def length(self) -> int:
        """Tokens of the longest sequence: ``max_length``, or the model's positions if those are fewer."""
        positions = int(getattr(self._config, "max_position_embeddings", None) or self.max_length)
        if positions <= self.max_new_tokens:
            raise ModelError(f"model {self.model!r} has {positions} positions, max_new_tokens is {self.max_new_tokens}")
        return min(self.max_length, positions)

    @property
    def spec(self) -> TaskSpec:
        """Vocabulary and length; there is no head, and the model generates."""
        return TaskSpec((), int(self._config.vocab_size), self.length, (), generates=True)

    def backbone(self) -> nn.Module:
        """Return the pre-trained causal language model in fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        model = from_pretrained(AutoModelForCausalLM, self.model, dtype=torch.float32)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        assert isinstance(model, torch.nn.Module)
        return model

    def size(self, split: Split) -> int:
        """Number of items of ``split``."""
        return len(self.split(split))

    @functools.cached_property
    def _encoded(self) -> dict[Split, list[Encoded]]:
        return {}

    def encoded(self, split: Split) -> list[Encoded]:
        """Tokens of each item of ``split`` (not padded), made once."""
        if split not in self._encoded:
            items, end = self.split(split), self.tokenizer.eos_token_id
            room = self.length - self.max_new_tokens
            prompts = self.tokenizer([item.prompt for item in items])["input_ids"]
            texts = [f" {one_line(item.references[0])}" for item in items]
            targets = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            self._encoded[split] = [
                Encoded(prompt[-room:], [*target, end][: self.max_new_tokens])
                for prompt, target in zip(prompts, targets, strict=True)
            ]
        return self._encoded[split]

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        """Prompts with their first references, of shape (batch, length): a multiple of 8 where it fits, right-padded.

        ``labels`` are -100 over the prompt and the padding.
        """
        chosen = [self.encoded(split)[i] for i in indices]
        rows = [item.prompt + item.target for item in chosen]
        labels = [[IGNORED] * len(item.prompt) + item.target for item in chosen]
        width = min(-(-max(map(len, rows)) // 8) * 8, self.length)
        return {
            "input_ids": padded(rows, self.tokenizer.pad_token_id, width),
            "attention_mask": padded([[1] * len(row) for row in rows], 0, width),
            "labels": padded(labels, IGNORED, width),
        }

    def prompts(self, split: Split, indices: Sequence[int]) -> Batch:
        """Prompts alone, padded on the left, as generation wants them: tensors of shape (batch, length)."""
        rows = [self.encoded(split)[i].prompt[::-1] for i in indices]
        width = max(map(len, rows))
        return {
            "input_ids": padded(rows, self.tokenizer.pad_token_id, width).flip(1),
            "attention_mask": padded([[1] * len(row) for row in rows], 0, width).flip(1),
        }

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield padded batches with ``labels``; ``train`` is shuffled by ``seed``, its incomplete last batch dropped.

        Raises :class:`DataError` where the training split has fewer items than one batch.
        """
        total = self.size(split)
        order = list(range(total))
        if split == "train":
            if total < batch_size:
                raise DataError(f"task {self.name}: {total} training items do not fill one batch of {batch_size}")
            lengths = [len(item.prompt) + len(item.target) for item in self.encoded(split)]
            order = pooled_order(lengths, batch_size, seed)
        for start in range(0, total - total % batch_size if split == "train" else total, batch_size):
            yield self.collate(split, order[start : start + batch_size])

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per item, in the split's order; prompts of similar length are run together.

        ``text`` is the first line of what is generated, ``label`` the first reference, ``log_probability`` that
        reference's, in nats, the end mark included.
        """
        import torch

        items, encoded = self.split(split), self.encoded(split)
        order = sorted(range(len(items)), key=lambda i: len(encoded[i].prompt))
        texts: dict[int, str] = {}
        nats: dict[int, float] = {}
        with torch.inference_mode():
            for chunk in chunks(order, max(1, SEQUENCES // self.num_beams)):
                texts.update(zip(chunk, self.generated(model, self.prompts(split, chunk)), strict=True))
            for chunk in chunks(order, ROWS):
                batch = on_device_of(model, self.collate(split, chunk))
                nats.update(zip(chunk, target_nats(model(**batch).logits, batch["labels"]), strict=True))
        return [
            Record(item.id, label=one_line(item.references[0]), log_probability=nats[i], text=texts[i])
            for i, item in enumerate(items)
        ]

    def generated(self, model: Any, prompts: Batch) -> list[str]:
        """First line of what ``model`` generates after each of the left-padded ``prompts``."""
        penalty = {"length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        tokens = model.generate(
            **on_device_of(model, prompts),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=self.num_beams,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **penalty,
        )
        new = tokens[:, prompts["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip().partition("\n")[0].strip() for text in texts]

    def requests(self) -> dict[str, Request]:
        """Read one prompt of median length (``batch1``); read it and write a text of median length (``generate``)."""
        encoded = self.encoded("test")
        lengths = [len(item.prompt) for item in encoded]
        middle = min(range(len(lengths)), key=lambda i: (abs(lengths[i] - statistics.median(lengths)), i))
        inputs = self.prompts("test", [middle])
        tokens = round(statistics.median(len(item.target) for item in encoded))
        return {
            "batch1": Request("forward", inputs, description="one prompt of median length"),
            "generate": Request(
                "generate", inputs, new_tokens=tokens, description="a text of median length after it, greedily"
            ),
        }

    def make_ready(self, say: Callable[[str], None]) -> None:
        """Train the backbone, where it is one that is trained once."""
        resolve(self.model, say)

    def data_revision(self) -> dict[str, str]:
        """Hash over the items of every split, and the model."""
        digest = hashlib.sha256()
        for split in ("train", "dev", "test"):
            for item in self.split(split):
                digest.update(json.dumps([split, *dataclasses.astuple(item)]).encode())
        return {"sha256": digest.hexdigest(), "backbone": revision(self.model)}


def one_line(text: str) -> str:
    """Return ``text`` with every run of white space made one space."""
    return " ".join(text.split())


def chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut ``indices`` into runs of ``size``, the last one shorter."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def padded(rows: Sequence[Sequence[int]], value: int, width: int) -> torch.Tensor:
    """Stack ``rows``, each padded on the right with ``value`` to ``width``."""
    import torch

    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def on_device_of(model: Any, batch: Batch) -> Batch:
    """Return ``batch`` on the device of the model's parameters."""
    device = next((p.device for p in model.parameters()), "cpu") if hasattr(model, "parameters") else "cpu"
    return {key: value.to(device) for key, value in batch.items()}


def target_nats(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Sum the log-probabilities of each row's labelled tokens, each predicted from the tokens before it, in nats.

    ``logits`` have the shape (batch, length, vocabulary), ``labels`` (batch, length) with -100 where nothing counts.
    """
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    tokens = labels[rows, places + 1]
    nats = logits[rows, places].float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    found: list[float] = nats.new_zeros(len(labels)).index_add(0, rows, nats).tolist()
    return found
