from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CONFIGS, tiny

from pareto_core.errors import DataError, ModelError
from pareto_cpu_runtime.checkpoint import save_packed
from pareto_cpu_runtime.quantise.config import Precision, QuantisationConfig
from pareto_cpu_runtime.quantise.flow import quantise
from pareto_cpu_runtime.runtime import Runtime
from pareto_cpu_runtime.sources import QuantisedSource, StateSource, read_directory

IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize("kind", CONFIGS)
def test_directories_that_transformers_writes_are_read(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    options: dict[str, Any] = {"precision": None, "threads": 1, "cache_dtype": "fp32"}
    expected = Runtime.from_pretrained(model, **options)(input_ids=IDS).logits
    assert torch.equal(Runtime.from_pretrained(tmp_path, **options)(input_ids=IDS).logits, expected)


def ending_model() -> tuple[Any, torch.Tensor]:
    """A model whose greedy text meets its end of text after a few tokens, and that text as transformers gives it."""
    model = tiny("llama")
    # 8 bits keep the order of the logits, so that every form of the model goes the same way.
    rounded = quantise(model, config=QuantisationConfig(bits=8, group_size=32)).dequantise()
    mask = torch.ones_like(IDS)
    text = rounded.generate(IDS, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None)
    end = int(text[0, 6])
    for made in (model, rounded):
        made.config.eos_token_id = made.generation_config.eos_token_id = end
    expected = rounded.generate(IDS, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert 4 <= expected.shape[1] <= 7
    assert int(expected[0, -1]) == end
    return model, expected


def stops(source: Any, expected: torch.Tensor, **options: Any) -> None:
    runtime = Runtime.from_pretrained(source, threads=1, cache_dtype="fp32", compute="fp32", **options)
    assert runtime.generate(IDS, max_new_tokens=30, do_sample=False).tolist() == expected.tolist()


def test_every_form_of_a_model_ends_its_texts(tmp_path: Path) -> None:
    model, expected = ending_model()
    eight = Precision(bits=8, group_size=32)
    small = quantise(model, config=QuantisationConfig(bits=8, group_size=32))
    stops(model, expected, precision=eight)
    stops(small, expected)
    stops(dataclasses.replace(small, generation_config=None), expected)
    save_packed(small, tmp_path / "packed")
    stops(tmp_path / "packed", expected)
    model.save_pretrained(tmp_path / "plain")
    stops(tmp_path / "plain", expected, precision=eight)
    (tmp_path / "plain" / "generation_config.json").unlink()
    stops(tmp_path / "plain", expected, precision=eight)


def test_an_end_of_text_of_the_generation_config_alone_is_kept(tmp_path: Path) -> None:
    model, expected = ending_model()
    model.config.eos_token_id = None
    small = quantise(model, config=QuantisationConfig(bits=8, group_size=32))
    stops(small, expected)
    save_packed(small, tmp_path)
    stops(tmp_path, expected)


def test_groups_that_do_not_divide_are_refused_where_they_are_asked_for() -> None:
    model = tiny("llama-odd")  # 80 inputs into down_proj
    for precision in (Precision(bits=8, group_size=32), Precision(group_size=32), Precision()):
        with pytest.raises(ModelError, match=r"weight has \d+ inputs, which groups of \d+ do not divide"):
            Runtime.from_pretrained(model, precision=precision)
    rows = Runtime.from_pretrained(model, precision="int4").kernels()
    assert (rows["0.down"]["group"], rows["0.qkv"]["group"]) == (96, 32)  # 80 filled up
    assert Runtime.from_pretrained(model, precision=Precision(group_size="channel")).kernels()["0.qkv"]["group"] == 64


def test_the_memory_asked_for_is_that_of_the_weights_as_they_will_lie() -> None:
    model = tiny("llama").to(torch.bfloat16)
    state = model.state_dict()
    values = sum(tensor.numel() for tensor in state.values())
    assert StateSource(model.config, state, None).nbytes() == 2 * values
    half = {name: tensor.half() for name, tensor in state.items()}  # fp16 becomes fp32
    assert StateSource(model.config, half, None).nbytes() == 4 * values
    rounded = {name: tensor.numel() for name, tensor in state.items() if tensor.dim() == 2 and "embed" not in name}
    small = StateSource(model.config, state, Precision(group_size=32)).nbytes()
    assert small == 2 * (values - sum(rounded.values())) + sum(rounded.values()) * 4.5 / 8
    quantised = quantise(model.float(), config=QuantisationConfig(group_size=32))
    kept = 2 * (values - sum(rounded.values()))  # here in fp32, above in bf16
    assert QuantisedSource(quantised).nbytes() == small + kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"config\.json: num_hidden_layers = 1000000000: the weights allow 1 to 21"),
        ({"num_hidden_layers": 1}, r"config\.json asks for 1 blocks, there are weights of 2"),
        ({"intermediate_size": 10**9}, r"intermediate_size"),
        ({"vocab_size": 0}, r"vocab_size"),
        ({"num_attention_heads": 0}, r"num_attention_heads"),
        ({"head_dim": 1.5}, r"config\.json"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, r"config"),
        ({"rope_parameters": [1, 2]}, r"config\.json"),
        ({"eos_token_id": "x"}, r"config\.json"),
    ],
)
def test_a_plain_directory_whose_config_was_altered_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError, match=message) as caught:
        Runtime.from_pretrained(tmp_path, threads=1)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}'])
def test_a_damaged_generation_config_is_named(text: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(DataError, match=r"generation_config\.json"):
        read_directory(tmp_path, None)


def test_weights_that_do_not_fit_name_the_directory(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{tmp_path}: model\.norm\.weight has values that are not finite"):
        Runtime.from_pretrained(tmp_path, threads=1)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}']
)
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json"):
        read_directory(tmp_path, None)


def test_sharded_weights_are_read_through_links_as_the_hub_keeps_them(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "blobs", max_shard_size="20KB")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    assert (snapshot / "model.safetensors.index.json").exists()
    ids = torch.tensor([[1, 2, 3]])
    expected = Runtime.from_pretrained(model, threads=1)(input_ids=ids).logits
    assert torch.equal(Runtime.from_pretrained(snapshot, threads=1)(input_ids=ids).logits, expected)
