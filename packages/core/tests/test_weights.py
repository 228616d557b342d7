from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from pareto_core import DataError, ModelError
from pareto_core.tiny import TinyTask
from pareto_core.weights import (
    add_bias,
    check_finite,
    freeze,
    load_transformer,
    parameter_counts,
    save_transformer,
    unfreeze,
    weight_bytes,
)


def t5(path: str) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 13).reshape(2, 5)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, labels=ids).logits
    return found


def test_counts_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert parameter_counts(model) == (12, 12)
    assert weight_bytes(model) == 4 * (12 + 4) + 8  # running mean and variance; a counter of 8 bytes
    freeze(model)
    assert parameter_counts(model) == (0, 12)
    unfreeze(model, ("0",))
    assert parameter_counts(model) == (8, 12)
    with pytest.raises(ModelError, match="no submodule 'head'; top level: 0, 1"):
        unfreeze(model, ("head",))


def test_shared_weights_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert weight_bytes(nn.Sequential(first, second)) == 64


def test_bytes_of_what_is_no_module() -> None:
    assert weight_bytes(SimpleNamespace(weight_bytes=7)) == 7
    assert weight_bytes(SimpleNamespace(weight_bytes=lambda: 9)) == 9
    with pytest.raises(ModelError, match="SimpleNamespace is deployed but has no weight_bytes"):
        weight_bytes(SimpleNamespace())


def test_freeze_takes_mappings_and_none() -> None:
    models = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    assert freeze(models) is models
    assert not any(p.requires_grad for m in models.values() for p in m.parameters())
    assert freeze(None) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    check_finite(model)
    model[1].bias.data[0] = value
    with pytest.raises(ModelError, match=r"weight 1\.bias holds NaN or infinite"):
        check_finite(model)


def test_save_and_load(tiny_t5: str, tmp_path: Path) -> None:
    model = t5(tiny_t5)
    save_transformer(model, tmp_path)
    loaded = load_transformer(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generate(torch.tensor([[4, 5]]), max_new_tokens=2).shape[0] == 1


def test_half_precision_stays(tiny_t5: str, tmp_path: Path) -> None:
    save_transformer(t5(tiny_t5).bfloat16(), tmp_path)
    loaded = load_transformer(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_every_weight_comes_back_in_its_own_dtype(tiny_t5: str, tmp_path: Path) -> None:
    model = t5(tiny_t5).bfloat16()
    norm = model.encoder.final_layer_norm
    norm.weight.data = norm.weight.data.float() + 1e-5  # lost in bfloat16
    save_transformer(model, tmp_path)
    loaded = load_transformer(tmp_path)
    state, found = model.state_dict(), loaded.state_dict()
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in state.items()}
    assert torch.equal(found["encoder.final_layer_norm.weight"], norm.weight)
    assert loaded.lm_head.weight is loaded.shared.weight  # tied weights stay tied
    assert not (tmp_path / "buffers.json").exists()


@pytest.mark.parametrize("cast", [True, False])
def test_computed_buffers_have_the_dtype_they_had(tmp_path: Path, cast: bool) -> None:
    model = TinyTask(architecture="llama").backbone().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    if cast:
        model.bfloat16()
    save_transformer(model, tmp_path)
    assert (tmp_path / "buffers.json").exists() == cast
    loaded = load_transformer(tmp_path)
    expected = dict(model.named_buffers())
    assert any(buffer.dtype == (torch.bfloat16 if cast else torch.float32) for buffer in expected.values())
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name])


def test_biases_are_added_to_layers_that_a_change_has_moved(tiny_t5: str, tmp_path: Path) -> None:
    def wrap(model: Any) -> None:
        layer = model.encoder.block[0].layer[0]
        layer.SelfAttention.q = nn.Sequential(layer.SelfAttention.q)

    model = t5(tiny_t5)
    wrap(model)
    add_bias(model.encoder.block[0].layer[0].SelfAttention.q[0])
    nn.init.ones_(model.encoder.block[0].layer[0].SelfAttention.q[0].bias)
    save_transformer(model, tmp_path)
    assert torch.equal(logits(load_transformer(tmp_path, wrap)), logits(model))


def test_weights_of_other_sizes_are_refused(tiny_t5: str, tmp_path: Path) -> None:
    save_transformer(t5(tiny_t5), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "encoder.final_layer_norm.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, path, {"format": "pt"})
    with pytest.raises(DataError, match=r"the weights do not fit T5ForConditionalGeneration"):
        load_transformer(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"no model\.safetensors in"):
        load_transformer(tmp_path)


@pytest.mark.parametrize("module", [nn.LayerNorm(4, bias=False), nn.Embedding(3, 4), nn.ReLU()])
def test_only_linear_layers_get_a_bias(module: nn.Module) -> None:
    before = {name for name, _ in module.named_parameters()}
    add_bias(module)
    assert {name for name, _ in module.named_parameters()} == before


def test_added_biases_come_back(tiny_t5: str, tmp_path: Path) -> None:
    model = t5(tiny_t5)
    before = logits(model)
    layer = model.encoder.block[0].layer[0].SelfAttention.q
    assert layer.bias is None
    add_bias(layer)
    assert torch.equal(logits(model), before)
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    after = logits(model)
    assert not torch.equal(after, before)
    bias = layer.bias
    add_bias(layer)
    assert layer.bias is bias
    save_transformer(model, tmp_path)
    loaded = load_transformer(tmp_path)
    assert torch.equal(logits(loaded), after)
    assert loaded.encoder.block[0].layer[0].SelfAttention.k.bias is None


def test_other_weights_than_the_architecture_has_are_refused(tiny_t5: str, tmp_path: Path) -> None:
    save_transformer(t5(tiny_t5), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "adapter.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(DataError, match=r"unexpected \['adapter.weight'\]"):
        load_transformer(tmp_path)
    name = "encoder.final_layer_norm.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(DataError, match=r"missing weights \['encoder.final_layer_norm.weight'\]"):
        load_transformer(tmp_path)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        load_transformer(tmp_path)
    for architectures in (["PreTrainedTokenizerFast"], ["os"], [], None):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures, "model_type": "t5"}))
        with pytest.raises(DataError, match="is not a model class of transformers"):
            load_transformer(tmp_path)


def test_only_transformers_are_saved_by_default(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Linear is not a transformers model: its method must define save and load"):
        save_transformer(nn.Linear(2, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []
