from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pareto_core import ModelError, backbones, tiny_gpt2, training_once
from pareto_core.backbones import from_pretrained, resolve
from pareto_core.library import library_path, read_functions, split_functions
from pareto_core.tiny_gpt2 import BODY, Recipe, topics, train, train_tokenizer, training_texts

TEXTS = [f"def f{i}(x):\n    return x + {i}  # number {i}" for i in range(60)]
SMALL = Recipe(
    width=16,
    layers=1,
    heads=2,
    positions=32,
    vocabulary=300,
    window=16,
    batch=4,
    steps=60,
    learning_rate=1e-2,
    warmup=5,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in which the model would be called ``key``."""
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    monkeypatch.setattr(tiny_gpt2, "revision", lambda: "key")
    return tmp_path / "tiny-gpt2"


def test_what_is_trained_loads_as_any_other_model_and_knows_its_texts(tmp_path: Path) -> None:
    train(SMALL, TEXTS, tmp_path / "model")
    model = from_pretrained(AutoModelForCausalLM, str(tmp_path / "model")).eval()
    tokenizer = from_pretrained(AutoTokenizer, str(tmp_path / "model"))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    ids = torch.tensor([tokenizer(TEXTS[7])["input_ids"]])
    assert ids.shape[1] < len(TEXTS[7])
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 0.6 * math.log(len(tokenizer))
        longest = torch.full((1, SMALL.positions), 5)
        assert model(longest).logits.shape == (1, SMALL.positions, len(tokenizer))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_training_again_gives_the_same_weights_and_never_touches_what_is_there(tmp_path: Path) -> None:
    train(SMALL, TEXTS, tmp_path / "one")
    train(SMALL, TEXTS, tmp_path / "two")
    files = {name: (tmp_path / "one" / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")}
    assert files == {name: (tmp_path / "two" / name).read_bytes() for name in files}
    train(SMALL, TEXTS[:30], tmp_path / "one")
    assert files == {name: (tmp_path / "one" / name).read_bytes() for name in files}
    assert len(list(tmp_path.iterdir())) == 2


def test_the_tokenizer_spells_any_text() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    text = "Größe: 3 × 4 ≠ 5\n\tünïcode 🙂 <|x|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300


def test_the_first_use_trains_and_the_next_ones_find_it(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    commands = []

    def run(command: list[str], *_: Any) -> None:
        commands.append(command)
        path = Path(command[-1])
        path.mkdir()
        (path / "config.json").write_text("{}")

    monkeypatch.setattr(training_once, "_run", run)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: resolve("tiny-gpt2"), range(8)))
    assert found == {str(cache / "key")}
    assert len(commands) == 1
    assert capsys.readouterr().err.count("training the offline GPT-2") == 1
    assert backbones.revision("tiny-gpt2") == "tiny-gpt2 key"
    assert backbones.revision("gpt2") == "gpt2"


def test_a_training_that_fails_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = cache.parent / "python"
    python.write_text("#!/bin/sh\necho 'OSError: no space left' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="training the offline GPT-2 failed: OSError: no space left"):
        resolve("tiny-gpt2")
    assert not (cache / "key").exists()


def test_it_has_read_nothing_that_tasks_are_scored_on() -> None:
    splits = split_functions(read_functions(library_path()))
    texts = training_texts()
    assert len(texts) == len(topics()) + 2 * len(splits["train"])
    assert max(map(len, texts[-len(splits["train"]) :])) <= BODY
    read = "\n".join(" ".join(text.split()) for text in texts)
    signatures = [f.signature for f in splits["train"] if f.arguments and f.signature in read]
    assert len(signatures) < 0.01 * len(splits["train"])
    for split in ("dev", "test"):
        known = [function.summary for function in splits[split] if function.summary in read]
        assert len(known) < 0.01 * len(splits[split]), known
