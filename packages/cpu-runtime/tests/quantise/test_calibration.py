from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pareto_core.errors import DataError
from pareto_cpu_runtime.quantise.calibration import calibration_tokens
from pareto_cpu_runtime.quantise.config import QuantisationConfig
from pareto_cpu_runtime.quantise.flow import quantise

GPTQ = QuantisationConfig(method="gptq", group_size=32, samples=2, length=100)


@pytest.mark.parametrize("kind", ["llama", "mpt", "gptj"])
def test_rows_are_no_longer_than_the_model_s_positions(model_of: Callable[..., Any], kind: str) -> None:
    model = model_of(kind)  # of 64 positions, which every config calls otherwise
    tokens = torch.randint(0, 64, (3, 100), generator=torch.Generator().manual_seed(0))
    rows = calibration_tokens(tokens, GPTQ, model)
    assert torch.equal(rows, tokens.reshape(-1)[:128].view(2, 64))
    assert quantise(model, tokens, GPTQ).matrices


@pytest.mark.parametrize("tokens", [torch.full((2, 8), 1.9), torch.ones(2, 8, dtype=torch.bool), torch.rand(300)])
def test_tokens_are_whole_numbers(model_of: Callable[..., Any], tokens: torch.Tensor) -> None:
    for calibration in (tokens, [tokens]):
        with pytest.raises(DataError, match=f"must be whole numbers, not {tokens.dtype}"):
            calibration_tokens(calibration, GPTQ, model_of("llama"))
