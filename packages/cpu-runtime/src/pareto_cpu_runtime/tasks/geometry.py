"""A decoder of a published shape with random weights: what it costs, where its weights are not at hand.

How long a forward pass takes does not depend on the values of the weights. What a model of random weights says means
nothing, so the score (nats per random token, near the logarithm of the vocabulary) only shows that variants agree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pareto_core import Batch, DataError, Metric, ModelError, Record, Request, Split, Task, TaskSpec
from pareto_core.backbones import from_pretrained
from pareto_core.tasks.byte_text import prompt_requests
from pareto_core.tasks.causal import on_device_of, target_nats

if TYPE_CHECKING:
    import torch
    from torch import nn

#: shapes by name, as fields of transformers' LlamaConfig: that of TinyLlama-1.1B, and a sixteenth of it for tests
GEOMETRIES: Mapping[str, Mapping[str, int]] = {
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry(Task):
    """Random tokens through a decoder of the shape ``geometry``; ``model`` names a real one instead, with its weights.

    Requests read prompts of ``prompt`` and ``long_prompt`` tokens, and continue them by ``new_tokens``. The score is
    over ``items`` texts of ``length`` tokens.
    """

    name: ClassVar[str] = "cpu_runtime.geometry"
    metric: ClassVar[Metric] = Metric("nats_per_token", unit="nats", higher_is_better=False)
    units: ClassVar[Mapping[str, str]] = {"nats_per_token": "nats"}

    geometry: Literal["tinyllama-1.1b", "small"] = "tinyllama-1.1b"
    model: str | None = None
    items: int = 4
    length: int = 64
    prompt: int = 32
    long_prompt: int = 512
    new_tokens: int = 32
    seed: int = 0

    def validate(self) -> None:
        """Check ranges."""
        for field in ("items", "prompt", "long_prompt"):
            self.require(field, getattr(self, field) > 0, "must be above 0")
        for field in ("length", "new_tokens"):
            self.require(field, getattr(self, field) > 1, "must be above 1")
        self.require("seed", self.seed >= 0, "must not be negative")

    @functools.cached_property
    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import AutoConfig, LlamaConfig

        if self.model is not None:
            return from_pretrained(AutoConfig, self.model)
        shape: Mapping[str, Any] = GEOMETRIES[self.geometry]
        return LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)

    @property
    def spec(self) -> TaskSpec:
        """Vocabulary and length; the model generates."""
        return TaskSpec((), int(self.config.vocab_size), self.length, (), generates=True)

    def backbone(self) -> nn.Module:
        """Return the decoder in fp32: random, the same each time, or the real one."""
        import torch
        from transformers import AutoModelForCausalLM

        if self.model is not None:
            found: nn.Module = from_pretrained(AutoModelForCausalLM, self.model, dtype=torch.float32)
            return found.eval()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model: nn.Module = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
            return model.eval()

    def size(self, split: Split) -> int:
        """Every split has the same number of texts."""
        return self.items

    def _tokens(self, split: Split, count: int) -> torch.Tensor:
        import torch

        seed = 3 * self.seed + {"train": 0, "dev": 1, "test": 2}[split]
        # Above 3 there are no marks in any vocabulary that this is for.
        low, high = 3, int(self.config.vocab_size)
        return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield ``input_ids`` and ``labels`` (batch, length), in the same order each time."""
        import torch

        texts = self._tokens(split, self.items * self.length).view(self.items, self.length)
        for chunk in torch.split(texts, batch_size):
            if split != "train" or len(chunk) == batch_size:
                yield {"input_ids": chunk, "labels": chunk.clone()}

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per text: ``log_probability`` of its tokens in nats, ``label`` their number."""
        import torch

        found: list[Record] = []
        for batch in self.batches(split, 1, 0):
            with torch.inference_mode():
                moved = on_device_of(model, batch)
                (nats,) = target_nats(model(input_ids=moved["input_ids"]).logits, moved["labels"])
            if not math.isfinite(nats):
                raise ModelError(f"task {self.name}: the log-probability of text {len(found)} is {nats}")
            found.append(Record(f"{split}:{len(found)}", label=float(self.length - 1), log_probability=nats))
        return found

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Mean nats per token."""
        size = sum(float(record.label or 0.0) for record in records)
        if not size:
            raise DataError(f"task {self.name}: no records to score")
        return {"nats_per_token": -sum(record.log_probability or 0.0 for record in records) / size}

    def requests(self) -> dict[str, Request]:
        """Prompts of two lengths, read (``forward…``) and continued (``generate…``)."""
        tokens = self._tokens("test", max(self.prompt, self.long_prompt))
        return prompt_requests(tokens, {"": self.prompt, "_long": self.long_prompt}, self.new_tokens)

    def data_revision(self) -> dict[str, str]:
        """What the model is."""
        return {"backbone": self.model or f"{self.geometry}, random weights of seed {self.seed}"}
