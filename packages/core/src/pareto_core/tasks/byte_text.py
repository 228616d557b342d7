"""Predict the bytes of CPython's library and language reference: language modelling that needs no download.

The texts are those of :mod:`pareto_core.byte_llama`, split by file. A record is one window of held-out bytes with the
log-probability that the model gives them, each byte predicted from those before it in the window; the window starts
from the byte before it, so that no byte is counted twice and none is predicted from nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pareto_core.backbones import BYTE_LLAMA, from_pretrained, resolve, revision
from pareto_core.byte_llama import END, read_texts, split_texts, text_hash, tokenizer, tokens_of
from pareto_core.errors import DataError, ModelError
from pareto_core.task import Batch, Metric, Record, Request, Split, Task, TaskSpec
from pareto_core.tasks.causal import chunks, on_device_of, target_nats
from pareto_core.tasks.text_to_text import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import nn

#: windows that are run together
ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteText(Task):
    """Held-out bytes in windows of ``window``; ``bits_per_byte`` is the score, lower is better.

    ``model`` is ``byte-llama``, or the directory of another causal language model whose token b is byte b. ``data`` may
    name another directory of Python sources. ``items`` keeps the first so many windows of dev and of test in an order
    drawn by hash. ``prompt`` and ``new_tokens`` are the lengths of the requests ``forward`` and ``generate``,
    ``long_prompt`` that of ``forward_long`` and ``generate_long``.
    """

    name: ClassVar[str] = "core.byte_text"
    metric: ClassVar[Metric] = Metric("bits_per_byte", unit="bits", higher_is_better=False)
    units: ClassVar[Mapping[str, str]] = {"bits_per_byte": "bits"}

    model: str = BYTE_LLAMA
    data: str | None = None
    window: int = 512
    items: int | None = 256
    prompt: int = 32
    new_tokens: int = 32
    long_prompt: int = 512

    def validate(self) -> None:
        """Check ranges."""
        self.require("window", self.window >= 2, "must be at least 2")
        self.require("items", self.items is None or self.items > 0, "must be above 0")
        for field in ("prompt", "long_prompt"):
            self.require(field, getattr(self, field) > 0, "must be above 0")
        self.require("new_tokens", self.new_tokens > 1, "must be above 1")

    @functools.cached_property
    def _texts(self) -> dict[str, bytes]:
        return read_texts(Path(self.data) if self.data else None)

    @functools.cached_property
    def _windows(self) -> dict[Split, torch.Tensor]:
        return {}

    def windows(self, split: Split) -> torch.Tensor:
        """Tokens (items, window + 1) of ``split``: each window and the byte before it.

        Raises :class:`DataError` where the split's texts do not fill one window.
        """
        if split not in self._windows:
            ids = tokens_of(split_texts(self._texts)[split])
            count = (len(ids) - 1) // self.window
            if count == 0:
                raise DataError(f"task {self.name}: {len(ids)} bytes of {split} do not fill a window of {self.window}")
            found = ids.unfold(0, self.window + 1, self.window)
            if split != "train" and self.items is not None:
                order = sorted(range(count), key=lambda n: hashlib.sha256(f"{split}:{n}".encode()).digest())
                found = found[sorted(order[: self.items])]
            self._windows[split] = found
        return self._windows[split]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of single bytes."""
        return tokenizer()

    @functools.cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        config = from_pretrained(AutoConfig, self.model)
        if config.vocab_size <= END:
            raise ModelError(f"model {self.model!r} has {config.vocab_size} tokens; bytes and the end mark need 257")
        return config

    @property
    def spec(self) -> TaskSpec:
        """Vocabulary and length; there is no head, and the model generates."""
        return TaskSpec((), int(self._config.vocab_size), self.window, (), generates=True)

    def backbone(self) -> nn.Module:
        """Return the trained decoder in fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        self.spec  # noqa: B018  a vocabulary that is too small is said before anything is loaded
        model = from_pretrained(AutoModelForCausalLM, self.model, dtype=torch.float32)
        assert isinstance(model, torch.nn.Module)
        return model.eval()

    def size(self, split: Split) -> int:
        """Number of windows of ``split``."""
        return len(self.windows(split))

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield ``input_ids`` and ``labels`` (batch, window + 1); ``train`` is shuffled, its incomplete batch dropped.

        Labels are -100 at the first byte, which nothing predicts, and at the marks between texts.
        """
        import torch

        windows = self.windows(split)
        order = torch.arange(len(windows))
        if split == "train":
            if len(windows) < batch_size:
                raise DataError(
                    f"task {self.name}: {len(windows)} training windows do not fill a batch of {batch_size}"
                )
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        for chunk in torch.split(order, batch_size):
            if split != "train" or len(chunk) == batch_size:
                yield self._batch(windows[chunk])

    def _batch(self, windows: torch.Tensor) -> Batch:
        labels = windows.masked_fill(windows == END, IGNORED)
        labels[:, 0] = IGNORED
        return {"input_ids": windows.contiguous(), "labels": labels}

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per window: ``log_probability`` of its bytes in nats, ``label`` their number.

        Raises :class:`ModelError` where the model gives a probability that is no number.
        """
        import torch

        windows = self.windows(split)
        found: list[Record] = []
        for chunk in chunks(range(len(windows)), ROWS):
            batch = on_device_of(model, self._batch(windows[chunk[0] : chunk[-1] + 1]))
            with torch.inference_mode():
                nats = target_nats(model(input_ids=batch["input_ids"]).logits, batch["labels"])
            counts = (batch["labels"] != IGNORED).sum(1).tolist()
            for number, value, count in zip(chunk, nats, counts, strict=True):
                if not math.isfinite(value):
                    raise ModelError(f"task {self.name}: the log-probability of window {split}:{number} is {value}")
                found.append(Record(f"{split}:{number}", label=float(count), log_probability=value))
        return found

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Bits per byte over all records, and the byte-level perplexity."""
        size = sum(float(record.label or 0.0) for record in records)
        if not size:
            raise DataError(f"task {self.name}: no records to score")
        bits = -sum(record.log_probability or 0.0 for record in records) / math.log(2) / size
        return {"bits_per_byte": bits}

    def requests(self) -> dict[str, Request]:
        """Prompts of two lengths from the held-out text, read (``forward…``) and continued (``generate…``)."""
        longest = max(self.prompt, self.long_prompt)
        text = self.windows("test").flatten()
        text = text[text < END]
        if len(text) < longest:
            raise DataError(f"task {self.name}: the test windows have {len(text)} bytes, a prompt needs {longest}")
        return prompt_requests(text, {"": self.prompt, "_long": self.long_prompt}, self.new_tokens)

    def make_ready(self, say: Callable[[str], None]) -> None:
        """Train the backbone, where it is one that is trained once."""
        resolve(self.model, say)

    def data_revision(self) -> dict[str, str]:
        """Hash of the texts, the Python version that they belong to, and the model."""
        return {
            "sha256": text_hash(self._texts),
            "python": platform.python_version(),
            "backbone": revision(self.model),
        }


def prompt_requests(tokens: torch.Tensor, lengths: Mapping[str, int], new_tokens: int) -> dict[str, Request]:
    """Requests ``forward`` and ``generate``, each with every suffix of ``lengths``: prompts of that many ``tokens``."""
    found = {}
    for suffix, length in lengths.items():
        inputs = {"input_ids": tokens[None, :length].clone()}
        about = f"{length} tokens in"
        found[f"forward{suffix}"] = Request("forward", inputs, description=about)
        found[f"generate{suffix}"] = Request(
            "generate", inputs, new_tokens=new_tokens, description=f"{about}, {new_tokens} out, greedily"
        )
    return found
