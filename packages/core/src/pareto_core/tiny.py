"""The tiny task of the conformance tests: one synthetic question, put to random models of five architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pareto_core.task import Batch, Metric, Record, Request, Split, Task, TaskSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Architecture = Literal["bert", "t5", "gpt2", "llama", "vit"]
#: architectures that answer with a class, and those that answer with a word and an end mark
CLASSIFIERS, DECODERS = ("bert", "vit"), ("gpt2", "llama")

LABELS = ("no", "yes")
#: texts are made of the tokens below ``NO``; the two answers follow, and the end mark, which also starts a decoder
NO, YES, END = 32, 33, 34
IGNORED = -100


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyTask(Task):
    """Synthetic: does token 1 occur more often than token 2? On a random model of 2 layers, in milliseconds.

    BERT classifies the tokens and ViT a picture of them; T5, GPT-2 and Llama answer in words. ``hidden`` is the model's
    width, a multiple of 8.
    """

    name: ClassVar[str] = "core.tiny"
    metric: ClassVar[Metric] = Metric("accuracy")

    architecture: Architecture = "bert"
    hidden: int = 48
    length: int = 12
    items: int = 64

    @property
    def answers_in_words(self) -> bool:
        """Whether the model is a language model rather than a classifier."""
        return self.architecture not in CLASSIFIERS

    @property
    def spec(self) -> TaskSpec:
        """Two classes over 32 tokens, and three more tokens where the answer is a word."""
        if self.answers_in_words:
            return TaskSpec(LABELS, END + 1, self.length, generates=True)
        return TaskSpec(LABELS, NO, self.length, head=("classifier",))

    def backbone(self) -> nn.Module:
        """Return a random model without dropout, the same each time."""
        import torch
        import transformers

        name, settings = _model(self.architecture, self.hidden, self.length)
        model_type: Any = getattr(transformers, name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = model_type(model_type.config_class(**settings))
            return model

    @property
    def one_shot_prompt(self) -> str:
        """The first training item with its answer, as :attr:`tokenizer` reads it."""
        ids, labels = self._data("train")
        return " ".join(map(str, [*ids[0].tolist(), NO + int(labels[0]), END]))

    @property
    def tokenizer(self) -> Callable[[str], dict[str, list[int]]]:
        """Reads tokens that are written as numbers."""
        return lambda text: {"input_ids": [int(word) for word in text.split()]}

    def size(self, split: Split) -> int:
        """Every split has the same number of items."""
        return self.items

    def _data(self, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed({"train": 1, "dev": 2, "test": 3}[split])
        ids = torch.randint(0, NO, (self.items, self.length), generator=generator)
        ids[:, ::2] %= 3
        return ids, ((ids == 1).sum(1) > (ids == 2).sum(1)).long()

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield the inputs and ``labels`` of the architecture.

        ``labels`` are classes of shape (batch,), or the tokens of the answer; those of GPT-2 and Llama follow the text,
        whose own labels are -100.
        """
        import torch

        ids, labels = self._data(split)
        order = torch.arange(self.items)
        if split == "train":
            order = torch.randperm(self.items, generator=torch.Generator().manual_seed(seed))
        for chunk in torch.split(order, batch_size):
            if split != "train" or len(chunk) == batch_size:
                yield self._batch(ids[chunk], labels[chunk])

    def _batch(self, ids: torch.Tensor, labels: torch.Tensor) -> Batch:
        import torch

        if not self.answers_in_words:
            return {**self._question(ids), "labels": labels}
        answer = torch.stack([labels + NO, torch.full_like(labels, END)], dim=1)
        if self.architecture not in DECODERS:
            return {**self._question(ids), "labels": answer}
        labels = torch.cat([torch.full_like(ids, IGNORED), answer], dim=1)
        return {**self._question(torch.cat([ids, answer], dim=1)), "labels": labels}

    def _question(self, ids: torch.Tensor) -> Batch:
        import torch

        if self.architecture == "vit":
            return {"pixel_values": _picture(ids)}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per item; the two answers are compared with each other alone."""
        import torch

        found: list[Record] = []
        ids, labels = self._data(split)
        with torch.no_grad():
            logits = self._answers(model(**self._batch(ids, labels)).logits.float())
        for row, label in zip(logits.log_softmax(-1), labels, strict=True):
            found.append(Record(str(len(found)), LABELS[int(row.argmax())], LABELS[int(label)], float(row[label])))
        return found

    def _answers(self, logits: torch.Tensor) -> torch.Tensor:
        """Those of the two answers, of shape (batch, 2)."""
        if not self.answers_in_words:
            return logits
        place = self.length - 1 if self.architecture in DECODERS else 0
        return logits[:, place, NO : YES + 1]

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Accuracy in percent."""
        return {"accuracy": 100.0 * sum(r.prediction == r.label for r in records) / len(records)}

    def requests(self) -> dict[str, Request]:
        """One item, and eight; and the answers to eight where they are generated."""
        import torch

        eight = self._question(self._data("test")[0][:8])
        asked = {"generate8": Request("generate", eight, new_tokens=2)} if self.answers_in_words else {}
        if self.architecture == "t5":
            eight = {**eight, "decoder_input_ids": torch.full((8, 1), END)}
        return {
            "batch1": Request("forward", {key: value[:1] for key, value in eight.items()}),
            "batch8": Request("forward", eight),
            **asked,
        }


def _model(architecture: Architecture, hidden: int, length: int) -> tuple[str, dict[str, Any]]:
    """The class of a model, and the fields of its configuration."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": END + 1, "pad_token_id": END, "bos_token_id": END, "eos_token_id": END}
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    # Prompts in front of the text, and the answer behind it, take positions too.
    room = 4 * length
    if architecture == "t5":
        sizes = {"d_model": hidden, "d_kv": hidden // 2, "d_ff": 2 * hidden, "num_layers": 2, "num_heads": 2}
        return "T5ForConditionalGeneration", {**sizes, **words, "dropout_rate": 0.0, "decoder_start_token_id": END}
    if architecture == "gpt2":
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return "GPT2LMHeadModel", {**sizes, **words, **dropouts, "n_inner": 2 * hidden, "n_positions": room}
    sizes["intermediate_size"] = 2 * hidden
    if architecture == "llama":
        return "LlamaForCausalLM", {**sizes, **words, "num_key_value_heads": 1, "max_position_embeddings": room}
    if architecture == "vit":
        return "ViTForImageClassification", {**sizes, **silent, "image_size": (2, 2 * length), "patch_size": 2}
    return "BertForSequenceClassification", {**sizes, **silent, "vocab_size": NO, "max_position_embeddings": length}


def _picture(ids: torch.Tensor) -> torch.Tensor:
    """Draw each token as a patch of 2 × 2 pixels: two colours for the tokens that count, one for which token it is."""
    import torch

    colours = torch.stack([ids == 1, ids == 2, ids / NO], dim=1).float()
    return colours.repeat_interleave(2, dim=-1).unsqueeze(2).expand(-1, -1, 2, -1).contiguous()
