from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pareto_core import ConfigError, DataError, ModelError, Record
from pareto_core.byte_llama import END, PAD, VOCABULARY, Recipe, split_texts, train
from pareto_core.tasks.byte_text import ByteText

SMALL = Recipe(width=32, layers=1, heads=2, kv_heads=1, inner=32, positions=64, window=16, batch=2, steps=20, warmup=5)
TEXTS = {f"{i:03}.py": f"def f{i}(x):\n    return x + {i}\n".encode() for i in range(100)}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ByteText:
    """The task on a hundred short files and a model of 20 steps."""
    root = tmp_path_factory.mktemp("bytes")
    (root / "data").mkdir()
    for name, text in TEXTS.items():
        (root / "data" / name).write_bytes(text)
    train(SMALL, TEXTS, root / "model")
    model, data = str(root / "model"), str(root / "data")
    return ByteText(model=model, data=data, window=16, items=6, prompt=4, long_prompt=20, new_tokens=3)


class Uniform:
    """Gives every byte the same probability, and nothing to the marks."""

    def __call__(self, input_ids: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[..., END:] = -torch.inf
        return SimpleNamespace(logits=logits)


def test_a_uniform_model_needs_eight_bits(task: ByteText) -> None:
    records = task.records(Uniform(), "test")
    assert [record.id for record in records] == [f"test:{i}" for i in range(6)]
    assert task.score(records)["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)


def test_each_byte_is_scored_from_those_before_it(task: ByteText) -> None:
    model: Any = task.backbone()
    records = task.records(model, "dev")
    for window, record in zip(task.windows("dev"), records, strict=True):
        nats, size = 0.0, 0
        for place in range(1, len(window)):
            if window[place] < 256:
                with torch.no_grad():
                    logits = model(window[None, :place]).logits[0, -1].double()
                nats += float(logits.log_softmax(-1)[window[place]])
                size += 1
        assert record.log_probability == pytest.approx(nats, rel=1e-4)
        assert record.label == size
    assert 0 < task.score(records)["bits_per_byte"] < 8


def test_windows_cover_the_text_once(task: ByteText) -> None:
    every = ByteText(**{**task.to_json(), "items": None})
    windows = every.windows("test")
    text = b"".join(bytes([0]) + t for t in split_texts(TEXTS)["test"].values())
    scored = windows[:, 1:].flatten()
    assert scored[scored < 256].tolist() == [b for b in text if b][: int((scored < 256).sum())]
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    assert task.size("test") == 6 < every.size("test")
    rows = {tuple(row.tolist()) for row in windows}
    assert all(tuple(row.tolist()) in rows for row in task.windows("test"))


def test_training_batches_are_shuffled_and_give_a_loss(task: ByteText) -> None:
    first, again, other = (list(task.batches("train", 4, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))
    batch = first[0]
    assert batch["input_ids"].shape == (4, 17)
    assert (batch["labels"] == -100).sum() == 4 + (batch["input_ids"][:, 1:] == END).sum()
    model: Any = task.backbone()
    with torch.no_grad():
        assert math.isfinite(float(model(**batch).loss))


def test_requests_have_the_lengths_that_were_asked_for(task: ByteText) -> None:
    requests = task.requests()
    assert {name: (r.kind, r.inputs["input_ids"].shape[1], r.new_tokens) for name, r in requests.items()} == {
        "forward": ("forward", 4, 0),
        "generate": ("generate", 4, 3),
        "forward_long": ("forward", 20, 0),
        "generate_long": ("generate", 20, 3),
    }
    model: Any = task.backbone()
    tokens = model.generate(**requests["generate"].inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 7)
    assert task.spec.vocabulary_size == VOCABULARY
    assert task.data_revision()["sha256"] != ByteText().data_revision()["sha256"]


def test_what_is_no_number_is_refused(task: ByteText) -> None:
    broken = SimpleNamespace(logits=torch.full((6, 17, VOCABULARY), torch.nan))
    with pytest.raises(ModelError, match="the log-probability of window test:0 is nan"):
        task.records(lambda input_ids: broken, "test")
    with pytest.raises(DataError, match="no records"):
        task.score([])
    assert task.score([Record("a", label=2.0, log_probability=-4 * math.log(2))]) == {"bits_per_byte": 2.0}


def test_bad_fields_and_texts_that_are_too_short(task: ByteText, tmp_path: Path) -> None:
    for field, value in [("window", 1), ("items", 0), ("prompt", 0), ("new_tokens", 1), ("long_prompt", -1)]:
        with pytest.raises(ConfigError, match=field):
            ByteText.from_json({field: value})
    with pytest.raises(DataError, match="do not fill a window of 5000"):
        ByteText(**{**task.to_json(), "window": 5000}).size("test")
    with pytest.raises(DataError, match="a prompt needs 5000"):
        ByteText(**{**task.to_json(), "long_prompt": 5000}).requests()
    with pytest.raises(DataError, match="do not fill a batch of 1000"):
        next(iter(task.batches("train", 1000, 0)))
    recipe, model = Recipe(width=16, layers=1, heads=2, kv_heads=1, inner=32), tmp_path / "small"
    from pareto_core.byte_llama import untrained

    small = untrained(recipe)
    small.resize_token_embeddings(PAD - 2)
    small.save_pretrained(model)
    with pytest.raises(ModelError, match="has 255 tokens; bytes and the end mark need 257"):
        ByteText(**{**task.to_json(), "model": str(model)}).backbone()
