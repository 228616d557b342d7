from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pareto_core import DataError, backbones, byte_llama
from pareto_core.backbones import from_pretrained, resolve
from pareto_core.byte_llama import (
    END,
    PAD,
    VOCABULARY,
    Recipe,
    read_texts,
    split_texts,
    text_hash,
    tokenizer,
    tokens_of,
    train,
    untrained,
)

TEXTS = {f"{i}.py": f"def f{i}(x):\n    return x + {i}  # number {i}\n".encode() for i in range(60)}
SMALL = Recipe(
    width=32,
    layers=1,
    heads=2,
    kv_heads=1,
    inner=32,
    positions=64,
    window=32,
    batch=4,
    steps=60,
    learning_rate=1e-2,
    warmup=5,
)


def test_what_is_trained_loads_as_any_other_model_and_knows_its_texts(tmp_path: Path) -> None:
    train(SMALL, TEXTS, tmp_path / "model")
    model = from_pretrained(AutoModelForCausalLM, str(tmp_path / "model")).eval()
    loaded = from_pretrained(AutoTokenizer, str(tmp_path / "model"))
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (END, END, PAD)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (END, PAD)
    ids = torch.tensor([loaded(TEXTS["7.py"].decode())["input_ids"]])
    assert ids[0].tolist() == list(TEXTS["7.py"])
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 0.5 * math.log(256)
        assert model(ids).logits.shape == (1, ids.shape[1], VOCABULARY)
    assert model.generate(ids[:, :8], max_new_tokens=4, do_sample=False).shape[1] <= 12


def test_training_again_gives_the_same_weights(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(SMALL, TEXTS, tmp_path / name)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")}) == 1


def test_every_byte_is_its_own_token_and_any_text_comes_back() -> None:
    bytewise = tokenizer()
    text = "Größe: 3 × 4 ≠ 5\n\tünïcode 🙂 \x00\x7f  def  f(x):"
    assert bytewise(text)["input_ids"] == list(text.encode())
    assert bytewise.decode(bytewise(text)["input_ids"]) == text
    assert len(bytewise) == VOCABULARY
    assert bytewise("a<|end|>b")["input_ids"] == [97, END, 98]
    assert bytewise.decode([97, END, PAD, 98], skip_special_tokens=True) == "ab"


def test_the_full_model_suits_grouped_weights() -> None:
    model = untrained(Recipe())
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert {layer.in_features % 128 for layer in layers} == {0}
    assert {layer.out_features % 16 for layer in layers} == {0}
    assert len(layers) == 7 * Recipe().layers + 1
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_texts_are_split_by_file_and_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "test").mkdir()
    for name, text in [("a.py", "x = 1\n"), ("package/b.py", "é\n"), ("package/empty.py", "\n"), ("test/c.py", "y")]:
        (tmp_path / name).write_text(text)
    texts = read_texts(tmp_path)
    assert texts == {"a.py": b"x = 1\n", "package/b.py": "é\n".encode()}
    assert tokens_of(texts).tolist() == [END, *b"x = 1\n", END, 195, 169, 10, END]
    assert text_hash(texts) != text_hash({**texts, "a.py": b"x = 2\n"}) != text_hash(texts)
    splits = split_texts(read_texts())
    names = [set(found) for found in splits.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == len(read_texts())
    assert all(len(found) > 20 for found in names)
    assert not [name for found in names for name in found if "encodings" in name or "_sysconfigdata" in name]


def test_a_directory_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no Python files with any text under {tmp_path}"):
        read_texts(tmp_path)


@pytest.mark.parametrize("name", list(byte_llama.RECIPES))
def test_the_backbone_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    monkeypatch.setattr(byte_llama, "revision", lambda name: f"key of {name}")
    made = tmp_path / name / f"key of {name}"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    assert resolve(name) == str(made)
    assert backbones.revision(name) == f"{name} key of {name}"


def test_each_recipe_has_a_key_of_its_own() -> None:
    assert byte_llama.revision("byte-llama") != byte_llama.revision("byte-llama-long")
