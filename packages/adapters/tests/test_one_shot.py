from __future__ import annotations

import pytest
import torch

from pareto_adapters import LoRA, OneShot
from pareto_core import ModelError, UnsupportedError
from pareto_core.tiny import END, TinyTask
from pareto_core.weights import parameter_counts

ARCHITECTURES = ["gpt2", "llama"]


class Wordless(TinyTask):
    """A task that nobody described."""

    one_shot_prompt = ""


def prompt_of(task):
    return torch.tensor(task.tokenizer(task.one_shot_prompt)["input_ids"])


def batch_of(task):
    return next(task.batches("test", 4, 0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_equals_the_text_with_the_prompt_written_in_front(architecture):
    task = TinyTask(architecture=architecture)
    plain, batch = task.backbone().eval(), batch_of(task)
    model = OneShot().build(task).eval()
    front = prompt_of(task).expand(4, -1)
    labels = torch.cat([torch.full_like(front, -100), batch["labels"]], 1)
    expected = plain(input_ids=torch.cat([front, batch["input_ids"]], 1), labels=labels)
    output = model(**batch)
    torch.testing.assert_close(output.logits, expected.logits[:, front.shape[1] :])
    torch.testing.assert_close(output.loss, expected.loss)
    without_mask = model(input_ids=batch["input_ids"])
    torch.testing.assert_close(without_mask.logits, output.logits)
    assert without_mask.loss is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture, side):
    task = TinyTask(architecture=architecture)
    model = OneShot().build(task).eval()
    short = batch_of(task)["input_ids"][:1, :7]
    margin, where = (3, 0) if side == "left" else (0, 3), slice(3, None) if side == "left" else slice(7)
    padded = torch.nn.functional.pad(short, margin, value=END)
    mask = torch.nn.functional.pad(torch.ones_like(short), margin)
    logits = model(input_ids=padded, attention_mask=mask).logits[:, where]
    torch.testing.assert_close(logits, model(input_ids=short).logits)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_equals_that_of_each_text_with_the_prompt_in_front(architecture, beams):
    task = TinyTask(architecture=architecture)
    plain, model = task.backbone().eval(), OneShot().build(task).eval()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    rows = [batch_of(task)["input_ids"][0, :8], batch_of(task)["input_ids"][1, :5]]
    padded = torch.stack([rows[0], torch.nn.functional.pad(rows[1], (3, 0), value=END)])
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    found = model.generate(input_ids=padded, attention_mask=mask, **settings)
    assert torch.equal(found[:, :8], padded)
    for row, tokens in zip(rows, found, strict=True):
        alone = torch.cat([prompt_of(task), row]).unsqueeze(0)
        expected = plain.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **settings)
        assert torch.equal(tokens[8:], expected[0, -4:])


def test_nothing_is_trained_and_what_is_saved_needs_no_task(tmp_path):
    task = TinyTask(architecture="gpt2")
    model = OneShot().build(task).eval()
    assert parameter_counts(model)[0] == 0
    assert OneShot().finish(model, task) is model
    OneShot().save(model, tmp_path)
    loaded = OneShot().load(tmp_path)
    assert torch.equal(loaded.prompt, prompt_of(task))
    assert not loaded.training
    batch = batch_of(task)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_a_tuned_model_can_be_prompted_too():
    task = TinyTask(architecture="llama")
    tuned = LoRA().finish(LoRA().build(task), task)
    torch.testing.assert_close(
        OneShot().build(task, tuned)(**batch_of(task)).logits.shape, torch.Size([4, 14, END + 1])
    )


def test_a_task_without_words_is_refused():
    with pytest.raises(UnsupportedError, match=r"task core\.tiny has no one_shot_prompt"):
        OneShot().build(Wordless(architecture="gpt2"))


def test_a_model_without_room_is_refused():
    task = TinyTask(architecture="gpt2")
    model = task.frozen_backbone()
    model.config.max_position_embeddings = 20
    with pytest.raises(
        ModelError, match="14 positions in front of texts of up to 12 tokens, but GPT2LMHeadModel has 20"
    ):
        OneShot().build(task, model)
