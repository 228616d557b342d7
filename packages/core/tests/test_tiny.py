from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from pareto_core import ConfigError
from pareto_core.tiny import END, IGNORED, NO, YES, Architecture, TinyTask

ARCHITECTURES = get_args(Architecture)


def first_batch(task: TinyTask, size: int = 8) -> dict[str, torch.Tensor]:
    return next(iter(task.batches("test", size, 0)))


def test_the_question_by_hand() -> None:
    task = TinyTask(items=40, length=10)
    batch = first_batch(task, 40)
    for ids, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert label == (ids.count(1) > ids.count(2))
    assert 5 < int(batch["labels"].sum()) < 35
    train = next(iter(task.batches("train", 40, 0)))["input_ids"]
    assert sorted(train.tolist()) != sorted(batch["input_ids"].tolist())
    records = task.records(task.backbone().eval(), "test")
    right = sum(r.prediction == r.label for r in records)
    assert task.score(records) == {"accuracy": 100.0 * right / 40}
    assert [r.label for r in records] == ["yes" if label else "no" for label in batch["labels"].tolist()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_the_same_each_time_and_has_the_width_asked_for(architecture: Architecture) -> None:
    task = TinyTask(architecture=architecture, hidden=32)
    first, second = task.backbone(), task.backbone()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    config: Any = first.config
    assert config.hidden_size == 32
    assert task.spec.head == (("classifier",) if architecture in ("bert", "vit") else ())
    assert all(hasattr(first, name) for name in task.spec.head)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_records_and_requests(architecture: Architecture) -> None:
    task = TinyTask(architecture=architecture, items=8)
    model: Any = task.backbone().eval()
    batch = first_batch(task)
    with torch.no_grad():
        output = model(**batch)
    assert bool(torch.isfinite(output.loss))
    classes = first_batch(TinyTask(items=8))["labels"]
    place = {"t5": 0, "gpt2": 11, "llama": 11}.get(architecture)
    logits = output.logits if place is None else output.logits[:, place, [NO, YES]]
    nats = logits.log_softmax(-1)
    for number, record in enumerate(task.records(model, "test")):
        assert record.label == ("no", "yes")[classes[number]]
        assert record.prediction == ("no", "yes")[int(nats[number].argmax())]
        assert record.log_probability == pytest.approx(float(nats[number, classes[number]]), abs=1e-5)
    requests = task.requests()
    assert {name: r.batch_size for name, r in requests.items() if r.kind == "forward"} == {"batch1": 1, "batch8": 8}
    assert model(**requests["batch8"].inputs).logits.shape[0] == 8
    assert ("generate8" in requests) == task.spec.generates == (place is not None)
    if place is not None:  # the end mark may not come first where two tokens are asked for
        request = requests["generate8"]
        tokens = model.generate(**request.inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert torch.equal(tokens[:, -2], output.logits[:, place, :END].argmax(-1))


def test_a_causal_model_reads_the_answer_behind_the_text() -> None:
    words, classes = first_batch(TinyTask(architecture="gpt2")), first_batch(TinyTask())
    answer = torch.stack([classes["labels"] + NO, torch.full((8,), END)], 1)
    assert torch.equal(words["input_ids"], torch.cat([classes["input_ids"], answer], 1))
    assert torch.equal(words["labels"], torch.cat([torch.full((8, 12), IGNORED), answer], 1))
    assert torch.equal(first_batch(TinyTask(architecture="t5"))["labels"], answer)


def test_a_picture_has_a_patch_for_each_token() -> None:
    pictures = first_batch(TinyTask(architecture="vit", length=5))["pixel_values"]
    ids = first_batch(TinyTask(length=5))["input_ids"]
    assert pictures.shape == (8, 3, 2, 10)
    for picture, tokens in zip(pictures, ids.tolist(), strict=True):
        for place, token in enumerate(tokens):
            patch = picture[:, :, 2 * place : 2 * place + 2]
            for colour, value in enumerate([float(token == 1), float(token == 2), token / 32]):
                assert torch.equal(patch[colour], torch.full((2, 2), value))


def test_the_one_shot_prompt_is_an_item_with_its_answer() -> None:
    task = TinyTask(architecture="gpt2")
    *ids, answer, end = task.tokenizer(task.one_shot_prompt)["input_ids"]
    assert len(ids) == 12
    assert (answer, end) == (YES if ids.count(1) > ids.count(2) else NO, END)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"TinyTask\.architecture = 'gpt5'.*'bert'"):
        TinyTask(architecture="gpt5")  # type: ignore[arg-type]
