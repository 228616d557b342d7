"""A cache of its own, one thread, and models whose answers are known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class BagOfInputs(torch.nn.Module):
    """A classifier of sums over the positions that count: what stands in the padding, or beside it, changes nothing."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, classes))
        self.rows: list[int] = []

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:
        first = inputs.get("input_ids", inputs.get("input_values"))
        assert first is not None
        assert first.shape == attention_mask.shape
        self.rows.append(first.numel())
        total = (first * attention_mask).double().sum(1)
        if "input_ids_2" in inputs:
            total += 3 * (inputs["input_ids_2"] * inputs["attention_mask_2"]).double().sum(1)
        return SimpleNamespace(logits=torch.sin(total[:, None] * self.weight).float())


@pytest.fixture
def bag() -> type[BagOfInputs]:
    return BagOfInputs
