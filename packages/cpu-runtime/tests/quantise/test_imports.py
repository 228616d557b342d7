from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pareto_core.errors import DataError, UnsupportedError
from pareto_cpu_runtime.checkpoint import dequantise, save_packed
from pareto_cpu_runtime.quantise.config import QuantisationConfig
from pareto_cpu_runtime.quantise.flow import quantise
from pareto_cpu_runtime.quantise.imports import import_awq, import_gptq
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def gptq_parts(matrix: QuantisedLinear, version: int) -> dict[str, torch.Tensor]:
    """The layout written out integer by integer."""
    (n, k), groups, bits = matrix.shape, matrix.scales.shape[1], matrix.bits
    per = 32 // bits
    zeros = matrix.grid.zeros.int() - (1 if version == 1 else 0)
    qweight = [
        [_signed(sum(int(matrix.codes[r, i * per + j]) << (bits * j) for j in range(per))) for r in range(n)]
        for i in range(k // per)
    ]
    qzeros = [
        [
            _signed(sum((int(zeros[i * per + j, g]) % 2**bits) << (bits * j) for j in range(per)))
            for i in range(n // per)
        ]
        for g in range(groups)
    ]
    return {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": (matrix.scales.float() * matrix.multiplier).half().t().contiguous(),
        "g_idx": torch.tensor([i // matrix.group for i in range(k)], dtype=torch.int32),
    }


def awq_parts(matrix: QuantisedLinear) -> dict[str, torch.Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(values: torch.Tensor) -> torch.Tensor:  # (rows, n)
        rows = [
            [_signed(sum(int(row[8 * i + order[j]]) << (4 * j) for j in range(8))) for i in range(len(row) // 8)]
            for row in values
        ]
        return torch.tensor(rows, dtype=torch.int32)

    scales = (matrix.scales.float() * matrix.multiplier).half().t().contiguous()
    return {"qweight": packed(matrix.codes.t()), "qzeros": packed(matrix.grid.zeros.int().t()), "scales": scales}


def written(
    model: Any, directory: Path, method: str, version: int = 1, bits: int = 4, symmetric: bool = False
) -> dict[str, torch.Tensor]:
    """Write the model as others do; returns the weights that it stands for, computed from its scales as written."""
    config = QuantisationConfig(group_size=32, bits=bits, symmetric=symmetric, leave_out=("lm_head",))
    quantised = quantise(model, config=config)
    tensors = {
        n: t.clone()
        for n, t in quantised.tensors.items()
        if n != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    weights = {}
    for name, matrix in quantised.matrices.items():
        parts = gptq_parts(matrix, version) if method == "gptq" else awq_parts(matrix)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        steps = matrix.codes.float() - matrix.grid.zeros.repeat_interleave(32, 1)
        weights[name] = steps * parts["scales"].t().float().repeat_interleave(32, 1)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    values = model.config.to_dict()
    values["architectures"] = [type(model).__name__]
    values["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": 32, "version": "gemm"}
    if method == "gptq":
        values["quantization_config"]["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    (directory / "config.json").write_text(json.dumps(values, default=str))
    return weights


@pytest.mark.parametrize(
    ("method", "version", "bits", "symmetric"),
    [("gptq", 1, 4, False), ("gptq", 1, 4, True), ("gptq", 2, 4, False), ("gptq", 1, 8, False), ("awq", 1, 4, False)],
)
def test_weights_are_those_that_were_written(
    model_of: Callable[..., Any],
    tokens: torch.Tensor,
    tmp_path: Path,
    method: str,
    version: int,
    bits: int,
    symmetric: bool,
) -> None:
    model = model_of("llama-tied")
    weights = written(model, tmp_path / "in", method, version, bits, symmetric)
    found = (import_gptq if method == "gptq" else import_awq)(tmp_path / "in")
    assert set(found.matrices) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(found.matrices[name].dequantise(), weight)
        assert found.matrices[name].symmetric == symmetric
    save_packed(found, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(dequantise(tmp_path / "out")(tokens).logits, found.dequantise()(tokens).logits)


def test_groups_that_are_not_neighbours_are_refused(model_of: Callable[..., Any], tmp_path: Path) -> None:
    written(model_of("llama"), tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up_proj: inputs of a group are not neighbours"):
        import_gptq(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", torch.zeros(8, 64, dtype=torch.int32), "do not fit each other"),
        ("qweight", torch.zeros(8, 64), "must be int32"),
        ("qzeros", None, "qzeros"),
        ("scales", torch.full((2, 128), float("nan"), dtype=torch.float16), "hold NaN"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    model_of: Callable[..., Any], tmp_path: Path, part: str, value: torch.Tensor | None, message: str
) -> None:
    written(model_of("llama"), tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{part}"
    del tensors[name]
    if value is not None:
        tensors[name] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=message):
        import_gptq(tmp_path)


def test_other_files_are_refused(model_of: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        import_gptq(tmp_path)
    written(model_of("llama"), tmp_path, "gptq")
    with pytest.raises(DataError, match="quant_method is 'gptq', expected 'awq'"):
        import_awq(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, kind, message in (
        ({"bits": 3}, UnsupportedError, "3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, UnsupportedError, "gemv"),
    ):
        altered = {**values, "quantization_config": {**values["quantization_config"], **change}}
        (tmp_path / "config.json").write_text(json.dumps(altered))
        with pytest.raises(kind, match=message):
            (import_awq if "version" in change else import_gptq)(tmp_path)
    del values["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="does not describe a quantised model"):
        import_gptq(tmp_path)
