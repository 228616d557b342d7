"""Classification by generated text: an encoder-decoder model answers with the label's word.

C. Raffel, N. Shazeer, A. Roberts, K. Lee, S. Narang, M. Matena, Y. Zhou, W. Li, P. J. Liu, "Exploring the Limits of
Transfer Learning with a Unified Text-to-Text Transformer", 2020, https://arxiv.org/abs/1910.10683.

A task that derives from :class:`TextToText` works on encoders, which get a classification head, and on encoder-decoder
models, which get none: the item becomes a prompt, the label a text, and what is generated greedily is read back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pareto_core.backbones import from_pretrained
from pareto_core.task import Batch, Record, Request, TaskSpec
from pareto_core.tasks.classification import Example, TextClassification

if TYPE_CHECKING:
    import torch
    from torch import nn

IGNORED = -100


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToText(TextClassification):
    """Base of the tasks that encoders classify and encoder-decoder models answer in words.

    A subclass defines :meth:`prompt`, and, where labels are not their own texts, :meth:`target`, :attr:`targets` and
    :meth:`parse`.
    """

    def prompt(self, example: Example) -> str:
        """Return the text that an encoder-decoder model reads."""
        raise TypeError(f"{type(self).__name__} must define prompt(example)")

    def target(self, label: str | float) -> str:
        """Return the text that stands for ``label``."""
        return str(label)

    @property
    def targets(self) -> tuple[str, ...]:
        """Every text that :meth:`target` may return."""
        return self.labels

    def parse(self, text: str) -> str | float | None:
        """Return the label that the generated ``text`` stands for, None where it is none."""
        return text if text in self.labels else None

    @functools.cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return from_pretrained(AutoConfig, self.model)

    @property
    def answers_in_words(self) -> bool:
        """Whether the backbone is an encoder-decoder model."""
        return bool(self._config.is_encoder_decoder)

    @property
    def spec(self) -> TaskSpec:
        """As for any text classification, without a head where labels are generated."""
        if not self.answers_in_words:
            return super().spec
        return TaskSpec(self.labels, int(self._config.vocab_size), self.max_length, (), generates=True)

    def backbone(self) -> nn.Module:
        """Return the pre-trained model in fp32, with a new head where it is an encoder."""
        if not self.answers_in_words:
            return super().backbone()
        import torch
        from transformers import AutoModelForSeq2SeqLM

        model = from_pretrained(AutoModelForSeq2SeqLM, self.model, dtype=torch.float32)
        assert isinstance(model, torch.nn.Module)
        return model

    def model_texts(self, example: Example) -> tuple[str, ...]:
        """The prompt, or the texts themselves for an encoder."""
        return (self.prompt(example),) if self.answers_in_words else super().model_texts(example)

    def label_tensor(self, examples: Sequence[Example]) -> torch.Tensor:
        """Tokens of the target texts, shape (batch, longest), padded with -100; class numbers for an encoder."""
        if not self.answers_in_words:
            return super().label_tensor(examples)
        import torch

        tokens = [torch.tensor(self._target_tokens[self.target(e.label)]) for e in examples]
        return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=IGNORED)

    @functools.cached_property
    def _target_tokens(self) -> dict[str, list[int]]:
        return {text: list(self.tokenizer(text_target=text)["input_ids"]) for text in self.targets}

    @property
    def new_tokens(self) -> int:
        """Tokens of the longest target, its end mark included."""
        return max(map(len, self._target_tokens.values()))

    def batch_records(self, model: Any, batch: Batch, examples: Sequence[Example]) -> list[Record]:
        """One record per example; ``text`` is what was generated, where labels are."""
        if not self.answers_in_words:
            return super().batch_records(model, batch, examples)
        nats = label_log_probabilities(model(**batch).logits, batch["labels"]).tolist()
        prompts = {key: value for key, value in batch.items() if key != "labels"}
        tokens = model.generate(**prompts, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1)
        texts = map(str.strip, self.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return [
            Record(example.id, self.parse(text), example.label, log_probability, text)
            for example, text, log_probability in zip(examples, texts, nats, strict=True)
        ]

    def requests(self) -> dict[str, Request]:
        """As for any text classification, and ``generate``: one text of median length to as many tokens as a label has.

        Forward passes of an encoder-decoder model read the start token alone on the decoder's side. §4.4.3 of the KronA
        chapter leaves open whether its "time to generate the output" is one pass or a generation: ``chapter4`` is one
        pass, since a label is a token or two.
        """
        found = super().requests()
        if self.answers_in_words:
            inputs = {key: found["batch1"].inputs[key] for key in ("input_ids", "attention_mask")}
            found["generate"] = Request(
                "generate", inputs, new_tokens=self.new_tokens, description="one text of median length, greedily"
            )
        return found

    def _inputs(self, indices: Sequence[int]) -> dict[str, Any]:
        return self._with_decoder(super()._inputs(indices))

    def _dummy(self) -> dict[str, Any]:
        return self._with_decoder(super()._dummy())

    def _with_decoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not self.answers_in_words:
            return inputs
        import torch

        start = self._config.decoder_start_token_id
        rows = inputs["input_ids"].shape[0]
        return {
            **inputs,
            "decoder_input_ids": torch.full((rows, 1), self.tokenizer.pad_token_id if start is None else start),
        }


def label_log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the log-probabilities of each row's target tokens, in nats; shape (batch,).

    ``logits`` have the shape (batch, length, vocabulary), ``labels`` (batch, length) with -100 where there is none.
    """
    tokens = labels.clamp(min=0).unsqueeze(-1)
    nats = logits.float().log_softmax(-1).gather(-1, tokens).squeeze(-1)
    return nats.masked_fill(labels == IGNORED, 0.0).sum(-1)
