"""Tasks of lm-evaluation-harness as one task: the mean of their accuracies, as in table 3.2.

The chapter averages the accuracies of LAMBADA (OpenAI's version), HellaSwag, WinoGrande and PIQA; its fifth data set,
WikiText, has a perplexity, which is reported beside the mean and is not part of it. Calibration reads the text of
CPython's library (:mod:`pareto_core.byte_llama`), or the file ``calibration``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pareto_core import Batch, DataError, Metric, Record, Request, Split, Task, TaskSpec
from pareto_core.backbones import from_pretrained, revision
from pareto_core.byte_llama import read_texts, split_texts
from pareto_core.tasks.byte_text import prompt_requests
from pareto_cpu_runtime.evaluation import CHAPTER_TASKS, evaluate

if TYPE_CHECKING:
    import torch
    from torch import nn

#: characters of the calibration text: more than any recipe reads
CHARACTERS = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harness(Task):
    """The tasks called ``tasks`` on ``model``, zero-shot; ``data`` may name a folder with further tasks' YAML files.

    ``limit`` keeps the first so many items of each. Texts have at most ``max_length`` tokens, ``rows`` of them run
    together. ``calibration`` names a file of text; ``length`` is that of its rows.
    """

    name: ClassVar[str] = "cpu_runtime.harness"
    metric: ClassVar[Metric] = Metric("accuracy")

    model: str = "EleutherAI/gpt-j-6B"
    tasks: tuple[str, ...] = CHAPTER_TASKS
    data: str | None = None
    limit: int | None = None
    max_length: int = 2048
    rows: int = 8
    calibration: str | None = None
    length: int = 512
    prompt: int = 32
    long_prompt: int = 1024
    new_tokens: int = 32

    def validate(self) -> None:
        """Check ranges."""
        self.require("tasks", bool(self.tasks) and len(set(self.tasks)) == len(self.tasks), "name tasks, none twice")
        self.require("limit", self.limit is None or self.limit > 0, "must be above 0")
        for field in ("rows", "prompt", "long_prompt"):
            self.require(field, getattr(self, field) > 0, "must be above 0")
        for field in ("max_length", "length", "new_tokens"):
            self.require(field, getattr(self, field) > 1, "must be above 1")

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return from_pretrained(AutoTokenizer, self.model)

    @property
    def units(self) -> Mapping[str, str]:  # type: ignore[override]
        """Perplexities have no unit."""
        return {f"{name}_word_perplexity": "" for name in self.tasks}

    @property
    def spec(self) -> TaskSpec:
        """Vocabulary and length; the model generates."""
        return TaskSpec((), len(self.tokenizer), self.length, (), generates=True)

    def backbone(self) -> nn.Module:
        """Return the pre-trained causal language model in fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        model: nn.Module = from_pretrained(AutoModelForCausalLM, self.model, dtype=torch.float32)
        return model.eval()

    @functools.cached_property
    def _rows(self) -> dict[Split, torch.Tensor]:
        import torch

        if self.calibration is None:
            splits = split_texts(read_texts())
            texts = {split: b"\n".join(found.values())[:CHARACTERS] for split, found in splits.items()}
        else:
            whole = Path(self.calibration).read_bytes()[:CHARACTERS]
            texts = dict.fromkeys(("train", "dev", "test"), whole)
        found: dict[Split, torch.Tensor] = {}
        for split, text in texts.items():
            tokens = torch.tensor(self.tokenizer(text.decode(errors="replace"), add_special_tokens=False)["input_ids"])
            found[split] = tokens[: len(tokens) // self.length * self.length].view(-1, self.length)
            if not len(found[split]):
                raise DataError(
                    f"task {self.name}: {len(tokens)} calibration tokens, fewer than a row of {self.length}"
                )
        return found

    def size(self, split: Split) -> int:
        """Rows of calibration text."""
        return len(self._rows[split])

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield ``input_ids`` and ``labels`` (batch, length) of the calibration text; ``train`` is shuffled."""
        import torch

        rows = self._rows[split]
        order = torch.arange(len(rows))
        if split == "train":
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        for chunk in torch.split(order, batch_size):
            if split != "train" or len(chunk) == batch_size:
                yield {"input_ids": rows[chunk], "labels": rows[chunk].clone()}

    def records(self, model: Any, split: Split) -> list[Record]:
        """One record per item of every task, whatever the split: right (``prediction`` 1.0) or wrong, or its nats."""
        found = evaluate(
            model,
            self.tokenizer,
            self.tasks,
            max_length=self.max_length,
            rows=self.rows,
            limit=self.limit,
            include=self.data,
        )
        return [record for name in self.tasks for record in _records(name, found["samples"].get(name, []))]

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Mean accuracy over the tasks in percent, each task's own, and word perplexities of those that have one."""
        right: dict[str, list[float]] = collections.defaultdict(list)
        rolling: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
        for record in records:
            name = record.id.partition(":")[0]
            if record.log_probability is None:
                right[name].append(float(record.prediction or 0.0))
            else:
                rolling[name].append((record.log_probability, float(record.label or 0.0)))
        if not right:
            raise DataError(f"task {self.name}: no records with an accuracy to score")
        accuracies = {f"{name}_accuracy": 100 * sum(values) / len(values) for name, values in sorted(right.items())}
        perplexities = {
            f"{name}_word_perplexity": math.exp(-sum(nats for nats, _ in pairs) / sum(words for _, words in pairs))
            for name, pairs in sorted(rolling.items())
        }
        return {"accuracy": sum(accuracies.values()) / len(accuracies), **accuracies, **perplexities}

    def requests(self) -> dict[str, Request]:
        """Prompts of two lengths from the calibration's test text, read (``forward…``) and continued."""
        tokens = self._rows["test"].flatten()
        longest = max(self.prompt, self.long_prompt)
        if len(tokens) < longest:
            raise DataError(f"task {self.name}: the text has {len(tokens)} tokens, a prompt needs {longest}")
        return prompt_requests(tokens, {"": self.prompt, "_long": self.long_prompt}, self.new_tokens)

    def data_revision(self) -> dict[str, str]:
        """The tasks with the harness's version, and the model."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            harness = version("lm-eval")
        except PackageNotFoundError:
            harness = "not installed"
        return {"tasks": " ".join(self.tasks), "lm_eval": harness, "backbone": revision(self.model)}


def _records(name: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[Record]:
    """Records called ``task:number``; raises DataError for a task that has neither accuracy nor word perplexity."""
    for sample in samples:
        place = f"{name}:{sample['doc_id']}"
        if "acc" in sample:
            yield Record(place, prediction=float(sample["acc"]), label=1.0)
        elif "word_perplexity" in sample:
            nats, words = sample["word_perplexity"]
            yield Record(place, label=float(words), log_probability=float(nats))
        else:
            raise DataError(f"task {name} has no accuracy and no word perplexity: only such tasks are averaged here")
