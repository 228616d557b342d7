"""One-shot prompting: nothing is trained, the task is described and shown once in front of every prompt.

T. B. Brown et al., "Language Models are Few-Shot Learners", NeurIPS 2020, https://arxiv.org/abs/2005.14165.

Reproduced: one worked example after a description of the task, the same for every item; the words are the task's own
(``one_shot_prompt``), its tokenizer reads them by themselves. They are read anew with every prompt, as they would be by
whoever writes them in front.

Where a batch is padded on the left, they stand in front of the padding, which positions skip and attention does not
see: every row is computed as if its text followed at once.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from pareto_adapters.prefix import check_decoder, check_room
from pareto_core import Method, Paper, UnsupportedError
from pareto_core.weights import load_transformer, require_files, save_transformer

if TYPE_CHECKING:
    from pathlib import Path

    from pareto_core import Task


class Prompted(nn.Module):
    """A causal language model that reads the tokens ``prompt`` (P,) in front of everything; they are in no output."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("prompt", prompt)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> CausalLMOutput:
        """Logits and loss of ``input_ids`` (batch, length) and its ``labels``; the prompt has none."""
        inputs = self._prompted(input_ids, attention_mask)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = self.model(**inputs, position_ids=positions, logits_to_keep=input_ids.shape[1]).logits
        loss = None
        if labels is not None:
            loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=self.model.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **settings: Any
    ) -> torch.Tensor:
        """``input_ids`` and what follows them; ``settings`` are those of transformers that count new tokens alone."""
        tokens: torch.Tensor = self.model.generate(**self._prompted(input_ids, attention_mask), **settings)
        return tokens[:, len(self.prompt) :]

    def _prompted(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompt = self.prompt.expand(len(input_ids), -1)
        return {
            "input_ids": torch.cat([prompt, input_ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(prompt, dtype=mask.dtype), mask], dim=1),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShot(Method):
    """Put the task's description and one worked example in front of every prompt; nothing is trained."""

    paper = Paper(
        title="Language Models are Few-Shot Learners",
        authors="T. B. Brown, B. Mann, N. Ryder, M. Subbiah and 27 others",
        year=2020,
        url="https://arxiv.org/abs/2005.14165",
    )

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put the words of ``task.one_shot_prompt`` in front of the model.

        Raises :class:`UnsupportedError` where the task has none.
        """
        start = self.starting_model(task, model)
        check_decoder("OneShot", start)
        text = getattr(task, "one_shot_prompt", "")
        if not text:
            raise UnsupportedError(
                f"task {task.name} has no one_shot_prompt: nothing describes it and shows an example"
            )
        prompt = torch.tensor(task.tokenizer(text)["input_ids"])
        check_room("OneShot", start, len(prompt), task)
        return Prompted(start, prompt)

    def save(self, deployed: Any, directory: Path) -> None:
        """Write the language model, and the tokens in front in ``one_shot.json``."""
        save_transformer(deployed.model, directory)
        (directory / "one_shot.json").write_text(json.dumps(deployed.prompt.tolist()))

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote."""
        require_files(directory, "config.json", "one_shot.json")
        prompt = torch.tensor(json.loads((directory / "one_shot.json").read_text()))
        return Prompted(load_transformer(directory), prompt).eval()
