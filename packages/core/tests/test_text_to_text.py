from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from pareto_core import Method, Paper, Protocol, Task
from pareto_core.tasks.glue import Glue
from pareto_core.tasks.text_to_text import label_log_probabilities
from pareto_core.testing import check_method
from pareto_core.weights import parameter_counts, unfreeze


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms(Method):
    """Trains the layer norms of a T5."""

    paper: ClassVar[Paper | None] = Paper("A title", "A. Author", 2020, "https://example.org/paper")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        start = self.starting_model(task, model)
        unfreeze(start, tuple(name for name, _ in start.named_modules() if name.endswith("layer_norm")))
        return start


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Halves of CoLA: the sentence is acceptable if it says "well"."""
    words = ["cat", "dog", "film", "plot", "ideas"]
    rows = [f"{a} {b} runs {end}\t{int(end == 'well')}" for a in words for b in words for end in ("well", "badly very")]
    (tmp_path / "CoLA").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "CoLA" / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (tmp_path / "STS-B").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        pairs = "".join(f"the cat ran\tthe dog ran\t{score}\n" for score in (5.0, 3.75, 0.1))
        (tmp_path / "STS-B" / name).write_text("sentence1\tsentence2\tscore\n" + pairs)
    return str(tmp_path)


class Says:
    """Answers with given texts in turn; its logits are uniform."""

    def __init__(self, task: Glue, answers: list[str]) -> None:
        self.task, self.answers = task, list(answers)
        self.asked: list[str] = []

    def __call__(self, **batch: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*batch["labels"].shape, 100))

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options == {"max_new_tokens": self.task.new_tokens, "do_sample": False, "num_beams": 1}
        self.asked += self.task.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        answers = [self.answers.pop(0) for _ in input_ids]
        tokens: torch.Tensor = self.task.tokenizer(answers, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([torch.zeros(len(tokens), 1, dtype=torch.long), tokens], 1)


def test_log_probabilities_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], [[0.6, 0.3, 0.1], [0.9, 0.05, 0.05]]]))
    found = label_log_probabilities(logits, torch.tensor([[0, 2], [1, -100]]))
    assert found.tolist() == pytest.approx([math.log(0.5 * 0.7), math.log(0.3)])


def test_batches(tiny_t5: str, data: str) -> None:
    task = Glue(subset="cola", model=tiny_t5, data=data)
    batch = task.collate("train", [0, 1])
    decoded = task.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert decoded == ["cola sentence: cat cat runs well", "cola sentence: cat cat runs badly very"]
    assert [task.tokenizer.convert_ids_to_tokens(row) for row in batch["labels"].tolist()] == [
        ["acceptable", "</s>"],
        ["unacceptable", "</s>"],
    ]
    assert task.backbone()(**batch).loss.isfinite()


def test_labels_are_padded_with_minus_100(tiny_t5: str, data: str) -> None:
    class Wordy(Glue):
        def target(self, label: str | float) -> str:
            return "very good" if label == "acceptable" else "bad"

        @property
        def targets(self) -> tuple[str, ...]:
            return ("very good", "bad")

    task = Wordy(subset="cola", model=tiny_t5, data=data)
    very, good, bad = task.tokenizer.convert_tokens_to_ids(["very", "good", "bad"])
    assert task.collate("train", [0, 1])["labels"].tolist() == [[very, good, 1], [bad, 1, -100]]
    assert task.new_tokens == 3


def test_spec_has_no_head(tiny_t5: str, data: str) -> None:
    task = Glue(subset="cola", model=tiny_t5, data=data)
    assert task.spec.head == ()
    assert task.spec.generates
    assert task.spec.labels == ("unacceptable", "acceptable")
    model: Any = task.frozen_backbone()
    assert task.spec.vocabulary_size == model.get_input_embeddings().num_embeddings
    assert parameter_counts(model)[0] == 0


def test_generated_texts_are_read_back(tiny_t5: str, data: str) -> None:
    task = Glue(subset="cola", model=tiny_t5, data=data)
    total = task.size("test")
    assert total == 25
    answers = ["acceptable", "unacceptable", "good film", ""] + ["acceptable"] * (total - 4)
    model = Says(task, answers)
    records = task.records(model, "test")
    examples = task.split("test")
    assert [r.id for r in records] == [e.id for e in examples]
    # the records stand in the split's order although shorter prompts were asked first
    said = dict(zip(model.asked, answers, strict=True))
    for record, example in zip(records, examples, strict=True):
        text = said[task.prompt(example)]
        assert record.text == text
        assert record.prediction == (text if text in task.labels else None)
        assert record.label == example.label
        assert record.log_probability == pytest.approx(-2 * math.log(100))
    right = sum(said[task.prompt(e)] == e.label for e in examples)
    assert task.score(records)["accuracy"] == pytest.approx(100 * right / total)


def test_ratings_are_read_back(tiny_t5: str, data: str) -> None:
    task = Glue(subset="stsb", model=tiny_t5, data=data)
    assert task.new_tokens == 2
    labels = [
        task.tokenizer.decode(row, skip_special_tokens=True) for row in task.collate("train", [0, 1, 2])["labels"]
    ]
    assert labels == ["5.0", "3.8", "0.0"]
    records = task.records(Says(task, ["3.6", "film"]), "test")
    assert [(r.prediction, r.text) for r in records] == [(3.6, "3.6"), (None, "film")]
    assert {r.label for r in records} <= {5.0, 3.75, 0.1}


def test_a_real_model_learns_to_answer(tiny_t5: str, data: str) -> None:
    task = Glue(subset="cola", model=tiny_t5, data=data)
    model: Any = task.backbone()
    before = task.records(model.eval(), "test")
    # independent reference: the model's own mean cross-entropy of one item, over its two target tokens
    with torch.no_grad():
        for i in (0, 7):
            loss = float(model(**task.collate("test", [i])).loss)
            assert before[i].log_probability == pytest.approx(-2 * loss, abs=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for epoch in range(8):
        for batch in task.batches("train", 10, epoch):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = task.records(model.eval(), "test")
    assert task.score(before)["accuracy"] < 60
    assert task.score(after) == pytest.approx(
        {"accuracy": 100.0, "matthews": 100.0, "majority_accuracy": task.score(before)["majority_accuracy"]}
    )
    assert sum(r.log_probability or 0 for r in after) > sum(r.log_probability or 0 for r in before) + 25


def test_requests(tiny_t5: str, data: str) -> None:
    task = Glue(subset="cola", model=tiny_t5, data=data)
    model: Any = task.backbone()
    requests = task.requests()
    assert set(requests) == {"batch1", "batch32", "chapter4", "generate"}
    for name in ("batch1", "batch32", "chapter4"):
        request = requests[name]
        assert request.inputs["decoder_input_ids"].tolist() == [[0]] * request.batch_size
        assert model(**request.inputs).logits.shape == (request.batch_size, 1, task.spec.vocabulary_size)
    assert requests["chapter4"].protocol == Protocol(150, 200, 3)
    assert requests["chapter4"].inputs["input_ids"].shape == (1, 10)
    generate = requests["generate"]
    assert (generate.kind, generate.new_tokens, generate.batch_size) == ("generate", 2, 1)
    tokens = model.generate(**generate.inputs, min_new_tokens=2, max_new_tokens=2)
    assert tokens.shape == (1, 3)
    assert task.size("test") == 25 == requests["batch32"].batch_size


def test_encoders_keep_their_requests(tiny_bert: str, data: str) -> None:
    requests = Glue(subset="cola", model=tiny_bert, data=data).requests()
    assert set(requests) == {"batch1", "batch32", "chapter4"}
    assert all("decoder_input_ids" not in request.inputs for request in requests.values())


def test_the_conformance_suite_runs_on_it(tiny_t5: str, data: str) -> None:
    check_method(Norms(), Glue(subset="cola", model=tiny_t5, data=data))
