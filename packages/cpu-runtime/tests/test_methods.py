from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pareto_core import ConfigError, DataError, ModelError, UnsupportedError
from pareto_core.byte_llama import Recipe, train
from pareto_core.tasks.byte_text import ByteText
from pareto_core.testing import TinyTask, check_config, check_method, entry_point_methods, load_method
from pareto_core.weights import weight_bytes
from pareto_cpu_runtime.auto_int4 import AutoInt4
from pareto_cpu_runtime.baselines import TorchBF16, TorchFP32, TorchInt4
from pareto_cpu_runtime.deployed import CodesLinear, DeployedRuntime
from pareto_cpu_runtime.methods import AWQ, GPTQ, RTN, TEQ, AutoRound, Int4, SignRound
from pareto_cpu_runtime.quantise.config import Precision, RoundingConfig, TEQConfig
from pareto_cpu_runtime.quantise.rtn import round_to_nearest

SMALL = Recipe(
    width=64, layers=2, heads=2, kv_heads=2, inner=384, positions=128, window=32, batch=4, steps=80,
    learning_rate=5e-3, warmup=5,
)  # fmt: skip
TEXTS = {f"{i:03}.py": f"def f{i}(x):\n    return x + {i}\n".encode() for i in range(200)}
QUICK: dict[str, Any] = {"samples": 8, "length": 32, "max_length": 96, "cache_dtype": "fp32", "threads": 1}
CALIBRATED: list[Int4] = [
    GPTQ(**QUICK),
    AWQ(**QUICK),
    TEQ(**QUICK, teq=TEQConfig(steps=4, batch=2)),
    SignRound(**QUICK, rounding=RoundingConfig(steps=4, batch=2)),
    AutoRound(**QUICK, rounding=RoundingConfig(steps=4, batch=2)),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ByteText:
    """Bytes of short files, and a model that has learned a little of them."""
    root = tmp_path_factory.mktemp("bytes")
    (root / "data").mkdir()
    for name, text in TEXTS.items():
        (root / "data" / name).write_bytes(text)
    train(SMALL, TEXTS, root / "model")
    paths = {"model": str(root / "model"), "data": str(root / "data")}
    return ByteText(**paths, window=32, items=8, prompt=4, long_prompt=40, new_tokens=3)


def made(method: Any, task: ByteText) -> Any:
    method.prepare(task)
    return method.finish(method.build(task, task.frozen_backbone()), task)


def bits(task: ByteText, model: Any) -> float:
    return task.score(task.records(model, "test"))["bits_per_byte"]


def test_every_entry_point_has_a_paper_and_refuses_bad_fields() -> None:
    names = entry_point_methods("pareto_cpu_runtime")
    assert {"rtn", "gptq", "awq", "teq", "signround", "autoround", "torch_fp32", "torch_bf16", "torch_int4"} <= set(
        names
    )
    for name in names:
        check_config(load_method(name)())


def test_the_conformance_suite(task: ByteText) -> None:
    check_method(RTN(**QUICK), task)
    check_method(TorchFP32(), task)
    check_method(TorchBF16(), task)
    check_method(TorchInt4(), task)


@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.algorithm)
def test_every_algorithm_keeps_what_the_model_knows(method: Int4, task: ByteText, tmp_path: Path) -> None:
    deployed = made(method, task)
    full = bits(task, task.backbone())
    assert full < 2.5
    assert bits(task, deployed) < 1.1 * full
    figures = {item.name: item.value for item in method.figures(deployed)}
    assert 4.4 < figures["bits_per_weight"] < 5.0  # 16 bits of scale per 32 weights, and panels of 64 outputs
    assert figures["packed_mib"] < weight_bytes(task.backbone()) / 2**20 / 2
    method.save(deployed, tmp_path)
    inputs = next(iter(task.batches("test", 2, 0)))["input_ids"]
    assert torch.equal(method.load(tmp_path)(input_ids=inputs).logits, deployed(input_ids=inputs).logits)


def test_a_model_is_saved_where_another_is_in_use(task: ByteText, tmp_path: Path) -> None:
    first, second = RTN(**QUICK), RTN(**QUICK, memory="map", bits=8)
    first.save(made(first, task), tmp_path)
    loaded = second.load(tmp_path)
    inputs = next(iter(task.batches("test", 2, 0)))["input_ids"]
    before = loaded(input_ids=inputs).logits
    eight = made(second, task)
    second.save(eight, tmp_path)
    assert torch.equal(loaded(input_ids=inputs).logits, before)
    assert torch.equal(second.load(tmp_path)(input_ids=inputs).logits, eight(input_ids=inputs).logits)


def test_every_number_format_of_the_kernels_can_be_asked_for(task: ByteText) -> None:
    from pareto_cpu_runtime._library import native

    computes = {row[1] for row in native().kernels()}
    here = {row[1] for row in native().kernels() if row[2] == "yes"}
    assert "fp16" in computes
    for compute in computes:
        method = RTN.from_json({**QUICK, "compute": compute})
        if compute not in here:
            with pytest.raises(ConfigError, match="compute"):
                made(method, task)


def test_calibration_is_read_once_and_from_the_training_split(task: ByteText, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    batches = ByteText.batches

    def watched(self: ByteText, split: Any, batch_size: int, seed: int) -> Any:
        asked.append(split)
        return batches(self, split, batch_size, seed)

    monkeypatch.setattr(ByteText, "batches", watched)
    made(GPTQ(**QUICK), task)
    assert asked == ["train"]
    made(RTN(**QUICK), task)
    assert asked == ["train"]


def test_the_runtime_agrees_with_torch_on_the_same_codes(task: ByteText) -> None:
    model = task.frozen_backbone()
    for symmetric, group in ((True, 32), (False, 64), (True, "channel")):
        fields = {**QUICK, "symmetric": symmetric, "group_size": group}
        native = made(RTN(**fields, compute="fp32"), task)
        plain = made(RTN(**fields, engine="torch"), task)
        assert isinstance(native, DeployedRuntime)
        assert isinstance(plain, nn.Module)
        inputs = next(iter(task.batches("test", 2, 0)))["input_ids"]
        a, b = native(input_ids=inputs).logits, plain(input_ids=inputs).logits
        assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max())
        quick = made(RTN(**fields), task)(input_ids=inputs).logits
        assert float((quick - b).abs().max()) < 0.1 * float(b.abs().max())
    assert weight_bytes(plain) < weight_bytes(model) / 3


@pytest.mark.parametrize(
    ("rows", "inputs", "group", "width", "symmetric"),
    [(3, 64, 32, 4, True), (5, 33, 33, 4, False), (4, 64, 64, 8, True), (6, 32, 32, 3, False)],
)
def test_a_layer_of_codes_computes_what_its_weight_does(
    rows: int, inputs: int, group: int, width: int, symmetric: bool
) -> None:
    torch.manual_seed(0)
    size = "channel" if group == inputs else group
    matrix = round_to_nearest(torch.randn(rows, inputs), Precision(bits=width, group_size=size, symmetric=symmetric))
    bias = torch.randn(rows)
    layer = CodesLinear(matrix, bias)
    assert torch.equal(layer.weight, matrix.dequantise())
    x = torch.randn(2, 7, inputs)
    expected = torch.einsum("...k,nk->...n", x.double(), matrix.dequantise().double()) + bias.double()
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_encoders_are_deployed_in_torch_alone(tmp_path: Path) -> None:
    task = TinyTask(hidden=64)
    with pytest.raises(UnsupportedError, match=r"has no architecture .bert.*engine = .torch. has any"):
        made(RTN(), task)  # type: ignore[arg-type]
    method = RTN(engine="torch", bits=8)
    deployed = made(method, task)  # type: ignore[arg-type]
    batch = next(iter(task.batches("test", 8, 0)))
    plain: Any = task.frozen_backbone()
    a, b = deployed(**batch).logits, plain.eval()(**batch).logits
    assert 0 < float((a - b).abs().max()) < 0.05 * float(b.abs().max())
    method.save(deployed, tmp_path)
    assert torch.equal(method.load(tmp_path)(**batch).logits, a)
    assert sum(isinstance(module, CodesLinear) for module in deployed.modules()) == 2 * 6


@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.algorithm)
def test_encoders_are_calibrated_too(method: Int4) -> None:
    task = TinyTask(hidden=64)
    deployed = made(dataclasses.replace(method, engine="torch", length=12), task)  # type: ignore[arg-type]
    batch = next(iter(task.batches("test", 8, 0)))
    plain: Any = task.frozen_backbone()
    a, b = deployed(**batch).logits, plain.eval()(**batch).logits
    assert 0 < float((a - b).abs().max()) < 0.5 * float(b.abs().max())
    assert sum(isinstance(module, CodesLinear) for module in deployed.modules()) == 2 * 6


def test_torch_int4_is_close_and_small(task: ByteText, tmp_path: Path) -> None:
    model = task.frozen_backbone()
    inputs = next(iter(task.batches("test", 2, 0)))["input_ids"]
    expected = model(input_ids=inputs).logits  # type: ignore[operator]
    for group in (32, 64):
        method = TorchInt4(group_size=group)
        deployed = made(method, task)
        difference = (deployed(input_ids=inputs).logits.float() - expected).abs().max()
        assert 0 < float(difference) < 0.25 * float(expected.abs().max())
        figures = {item.name: item.value for item in method.figures(deployed)}
        assert figures == {"bits_per_weight": 4 + 32 / group, "kernel.torch_int4pack": 15}
    method.save(deployed, tmp_path)
    (tmp_path / "torch_int4.json").unlink()
    with pytest.raises(DataError, match=r"no torch_int4\.json"):
        method.load(tmp_path)
    with pytest.raises(ModelError, match="no linear layer 'lm_haed'"):
        made(TorchInt4(leave_out=("lm_haed",)), task)
    with pytest.raises(ModelError, match="groups of 256 divide"):
        made(TorchInt4(group_size=256), task)


def test_bad_fields_are_refused_by_name(task: ByteText) -> None:
    for field, value in [
        ("bits", 5),
        ("group_size", 48),
        ("samples", 0),
        ("threads", 0),
        ("max_length", -1),
        ("kernel", ""),
    ]:
        with pytest.raises(ConfigError, match=field):
            RTN.from_json({field: value})
    with pytest.raises(ModelError, match="group"):
        made(dataclasses.replace(RTN(**QUICK), group_size=256), task)
    with pytest.raises(DataError, match="not a packed model"):
        RTN().load(Path("/nonexistent"))


def test_the_search_stops_at_the_target(task: ByteText, tmp_path: Path) -> None:
    method = AutoInt4(max_relative_loss=0.5, group_sizes=(64, 32), samples=8, length=32, max_length=96, threads=1)
    deployed = made(method, task)
    assert [trial["name"] for trial in deployed.search["trials"]] == ["rtn-g64"]
    figures = {item.name: item.value for item in method.figures(deployed)}
    plain: Any = task.backbone()
    source = task.score(task.records(plain, "dev"))["bits_per_byte"]
    assert figures["trial.1.rtn-g64"] == pytest.approx(source * (1 + figures["search_loss_percent"] / 100))
    assert figures["search_target_reached"] == 1.0
    method.save(deployed, tmp_path)
    inputs = next(iter(task.batches("test", 2, 0)))["input_ids"]
    loaded = method.load(tmp_path)
    assert torch.equal(loaded(input_ids=inputs).logits, deployed(input_ids=inputs).logits)
    assert method.figures(loaded) == method.figures(deployed)
    for wrong in ({"max_relative_loss": 1.5}, {"group_sizes": []}, {"group_sizes": [32, 32]}, {"samples": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AutoInt4.from_json(wrong)


def test_two_processes_answer_as_one_does(task: ByteText) -> None:
    pytest.importorskip("pareto_cpu_runtime.parallel")
    fields = {name: value for name, value in QUICK.items() if name != "threads"}
    inputs = next(iter(task.batches("test", 1, 0)))["input_ids"]
    alone = made(RTN(**fields, compute="fp32"), task)(input_ids=inputs).logits
    shared = made(RTN(**fields, compute="fp32", ranks=2), task)
    try:
        assert float((shared(input_ids=inputs).logits - alone).abs().max()) < 1e-3 * float(alone.abs().max())
    finally:
        shared.runtime.close()
    with pytest.raises(ConfigError, match="ranks = 2: above 1 needs the runtime"):
        RTN(ranks=2, engine="torch")
