from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import ClassVar

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from pareto_adapters import (
    AdapterLConfig,
    FTProjections,
    KronA,
    KronABConfig,
    KronAConfig,
    LoDAConfig,
    LoRA,
)
from pareto_adapters._peft import Cell, TunerConfig
from pareto_adapters._registration import register
from pareto_adapters.krona import KronALayer
from pareto_core import ModelError
from pareto_core.tiny import TinyTask

TARGETS = {"bert": ["query", "value"], "t5": ["q", "v"], "llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"]}
KINDS = list(TARGETS)


def config(kind: str, **options) -> KronAConfig:
    return KronAConfig(
        **{"a_shape": (4, 2), "target_modules": TARGETS[kind], "init": "normal", "scale": 3.0, **options}
    )


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_story_train_save_load_disable_merge(make_model, make_batch, tmp_path, kind):
    batch = make_batch(kind)
    plain = make_model(kind).eval()(**batch).logits
    model = get_peft_model(make_model(kind), config(kind, init="kaiming")).eval()
    close(model(**batch).logits, plain, 5e-6)
    train(model, batch)
    trained = model(**batch).logits
    assert not torch.allclose(trained, plain)
    with model.disable_adapter():
        close(model(**batch).logits, plain, 5e-6)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(make_model(kind), tmp_path, low_cpu_mem_usage=low_memory).eval()
        close(again(**batch).logits, trained, 5e-6)
        assert not any(p.requires_grad for p in again.parameters())
    model.merge_adapter()
    close(model(**batch).logits, trained)
    with model.disable_adapter():
        close(model(**batch).logits, plain)
    model.unmerge_adapter()
    close(model(**batch).logits, trained)
    deployed = model.merge_and_unload(safe_merge=True)
    close(deployed(**batch).logits, trained)
    assert set(deployed.state_dict()) == set(make_model(kind).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_match_the_definition(make_model, kind):
    model = get_peft_model(make_model(kind), config(kind))
    layers = [module for module in model.modules() if isinstance(module, KronALayer)]
    assert layers
    for layer in layers:
        cell, base = layer.cells["default"], layer.get_base_layer()
        before = base.weight.clone()
        layer.merge()
        product = 3.0 * torch.kron(cell.A, cell.B)
        close(base.weight - before, product if kind == "gpt2" else product.T)


def test_several_adapters(make_model, make_batch, tmp_path):
    batch = make_batch("bert")
    plain = make_model("bert").eval()(**batch).logits
    model = get_peft_model(make_model("bert"), config("bert"), adapter_name="one").eval()
    one = model(**batch).logits
    model.add_adapter("two", config("bert", a_shape=(2, 8), target_modules=["query", "dense"]))
    close(model(**batch).logits, one, 5e-6)
    model.set_adapter("two")
    two = model(**batch).logits
    assert not torch.allclose(one, two)
    assert all(".two." in name for name, p in model.named_parameters() if p.requires_grad)
    model.base_model.set_adapter(["one", "two"])
    both = model(**batch).logits
    assert not torch.allclose(both, two)
    model.merge_adapter()
    close(model(**batch).logits, both)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path / "one", adapter_name="renamed").eval()
    close(loaded(**batch).logits, one, 5e-6)
    loaded.load_adapter(tmp_path / "two", adapter_name="two")
    loaded.set_adapter("two")
    close(loaded(**batch).logits, two, 5e-6)
    loaded.delete_adapter("two")
    loaded.set_adapter("renamed")
    close(loaded(**batch).logits, one, 5e-6)
    assert not any(".two." in name for name in loaded.state_dict())
    close(loaded.unload()(**batch).logits, plain, 5e-6)


def test_inject_and_transformers_own_interface(make_model, make_batch, tmp_path):
    batch = make_batch("bert")
    injected = inject_adapter_in_model(config("bert"), make_model("bert")).eval()
    assert type(injected) is type(make_model("bert"))
    assert sum("krona_cell" in key for key in injected.state_dict()) == 8
    model = make_model("bert")
    model.add_adapter(config("bert"), adapter_name="a")
    model.eval()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    other = make_model("bert")
    other.load_adapter(tmp_path, adapter_name="b")
    close(other.eval()(**batch).logits, expected, 5e-6)
    other.disable_adapters()
    close(other(**batch).logits, make_model("bert").eval()(**batch).logits, 5e-6)
    other.enable_adapters()
    other.delete_adapter("b")
    assert not any("krona_cell.b" in key for key in other.state_dict())


def test_modules_to_save_and_layers_to_transform(make_model, make_batch, tmp_path):
    options = {"modules_to_save": ["classifier"], "layers_to_transform": [1], "exclude_modules": ["value"]}
    model = get_peft_model(make_model("bert"), config("bert", **options))
    names = [name for name, module in model.named_modules() if isinstance(module, KronALayer)]
    assert names == ["base_model.model.bert.encoder.layer.1.attention.self.query"]
    train(model, make_batch("bert"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path).eval()
    close(loaded(**make_batch("bert")).logits, model.eval()(**make_batch("bert")).logits, 5e-6)


def test_default_targets_all_linear_and_regular_expressions(make_model):
    def adapted(targets):
        model = get_peft_model(make_model("bert"), config("bert", a_shape=(1, 1), target_modules=targets))
        return {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, KronALayer)}

    assert adapted(None) == {"query", "value"}
    assert adapted(".*self.*key") == {"key"}
    assert adapted("all-linear") == {"query", "key", "value", "dense", "classifier"}


def test_bf16_base_with_adapters_in_single_and_in_half_precision(make_model, make_batch):
    for cast in (True, False):
        model = get_peft_model(make_model("llama").bfloat16(), config("llama"), autocast_adapter_dtype=cast).eval()
        adapter = {p.dtype for p in model.parameters() if p.requires_grad}
        assert adapter == ({torch.float32} if cast else {torch.bfloat16})
        logits = model(**make_batch("llama")).logits
        assert logits.dtype == torch.bfloat16
        train(model, make_batch("llama"), steps=1)
        model.merge_adapter()
        assert {p.dtype for p in model.get_base_model().model.layers[0].mlp.down_proj.base_layer.parameters()} == {
            torch.bfloat16
        }


def test_autocast(make_model, make_batch):
    model = get_peft_model(make_model("bert"), config("bert"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**make_batch("bert")).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_batch):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(make_model("llama"), config("llama")).train()
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(**make_batch("llama")).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-6)


def test_compiles_without_graph_breaks(make_model):
    model = get_peft_model(make_model("bert"), config("bert"))
    layer = next(module for module in model.modules() if isinstance(module, KronALayer))
    x = torch.randn(3, 5, 16)
    close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_pickle_and_deepcopy(make_model, make_batch):
    model = get_peft_model(make_model("bert"), config("bert")).eval()
    expected = model(**make_batch("bert")).logits
    close(copy.deepcopy(model)(**make_batch("bert")).logits, expected, 5e-6)
    close(pickle.loads(pickle.dumps(model))(**make_batch("bert")).logits, expected, 5e-6)


def test_meta_device_and_dtype_moves(make_model):
    with torch.device("meta"):
        model = get_peft_model(make_model("bert"), config("bert"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    moved = get_peft_model(make_model("bert"), config("bert")).double()
    assert {p.dtype for p in moved.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_partitioned_by_zero_3_are_not_looked_at(make_model, kind):
    model = make_model(kind)
    sizes = {}
    for name, module in model.named_modules():
        if name.endswith(tuple(f".{target}" for target in TARGETS[kind])):
            sizes[name] = tuple(module.weight.shape if kind == "gpt2" else reversed(module.weight.shape))
            module.weight.ds_shape = module.weight.shape
            module.weight.data = torch.empty(0)
    adapted = get_peft_model(model, config(kind))
    for name, (inputs, outputs) in sizes.items():
        cell = adapted.get_submodule(f"base_model.model.{name}").cells["default"]
        assert (4 * cell.B.shape[0], 2 * cell.B.shape[1]) == (inputs, outputs)


def test_converts_to_lora(make_model, make_batch):
    model = get_peft_model(make_model("bert"), config("bert")).eval()
    expected = model(**make_batch("bert")).logits
    lora, state = convert_to_lora(model, rank=16)
    other = get_peft_model(make_model("bert"), lora).eval()
    set_peft_model_state_dict(other, state)
    close(other(**make_batch("bert")).logits, expected)


def test_an_adapter_that_holds_nan_is_not_merged(make_model):
    model = get_peft_model(make_model("bert"), config("bert"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    last = [module for module in model.modules() if isinstance(module, KronALayer)][-1]
    last.cells["default"].B.data[0, 0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ModelError, match=r"'default' at .*value.* holds NaN"):
            merge()
    with pytest.raises(ModelError, match="gives NaN or infinite weights"):
        last.merge()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "krona" not in k)


def test_a_merge_that_fails_in_one_layer_changes_none(make_model):
    model = get_peft_model(make_model("bert"), config("bert"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    last = [module for module in model.modules() if isinstance(module, KronALayer)][-1]
    for factor in (last.cells["default"].A, last.cells["default"].B):
        factor.data.fill_(1e30)  # finite, but their product is not
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ModelError, match=r"layer\.1\..*value.*gives NaN or infinite weights.*nothing was merged"):
            merge()
    layers = [module for module in model.modules() if isinstance(module, KronALayer)]
    assert len(layers) == 4
    assert not any(layer.merged for layer in layers)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "krona" not in k)


def test_adapters_that_are_asked_for_by_name_are_checked(make_model):
    model = get_peft_model(make_model("bert"), config("bert"), adapter_name="good")
    model.add_adapter("bad", config("bert"))
    last = [module for module in model.modules() if isinstance(module, KronALayer)][-1]
    last.cells["bad"].A.data[0, 0] = float("nan")
    state = {key: value.clone() for key, value in model.state_dict().items() if "krona" not in key}
    with pytest.raises(ModelError, match=r"adapter 'bad' at .* holds NaN"):
        model.merge_adapter(adapter_names=["good", "bad"])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    model.set_adapter("bad")
    model.merge_adapter(adapter_names=["good"])
    assert last.merged_adapters == ["good"]


def test_a_weight_that_the_embedding_shares_is_not_merged_into(make_model):
    model = get_peft_model(make_model("gpt2"), config("gpt2", target_modules=["lm_head"]))
    with pytest.raises(ModelError, match=r"'lm_head' shares its weight with transformer\.wte\.weight"):
        model.merge_and_unload()
    untied = make_model("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    get_peft_model(untied, config("gpt2", target_modules=["lm_head"])).merge_and_unload()


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize("method", [KronA, LoRA, FTProjections])
def test_methods_that_merge_refuse_shared_weights_before_training(architecture, method):
    task = TinyTask(architecture=architecture)
    fields = {"a_shape": (8, 7)} if method is KronA else {}
    if method is FTProjections:  # trains the weight itself, as long as nothing is fused
        method(target_modules=("lm_head",)).build(task)
    else:
        with pytest.raises(ModelError, match="'lm_head' shares its weight with"):
            method(target_modules=("lm_head",), **fields).build(task)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KronAConfig(a_shape=(4, 2), target_modules=["query", "value", "dense"]),
        lambda: LoDAConfig(target_modules=["query", "value", "dense"]),
        lambda: KronABConfig(a_shape=(4, 2)),
        lambda: KronABConfig(a_shape=(4, 2), placement="sequential", target_modules=r".*layer\.\d+\.output\.dense"),
        lambda: AdapterLConfig(),
    ],
)
def test_adapters_in_half_precision_leave_the_base_in_its_own(make_model, make_batch, make):
    batch = make_batch("bert")
    expected = make_model("bert").eval()(**batch).logits
    model = get_peft_model(make_model("bert"), make()).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(model(**batch).logits, expected)  # each of them starts at zero


def test_an_update_in_half_precision_is_rounded_as_such_and_no_more(make_model):
    model = get_peft_model(make_model("bert"), config("bert", scale=1e-3)).eval()
    layer = next(module for module in model.modules() if isinstance(module, KronALayer))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    base = layer.base_layer(x)
    exact = layer(x) - base
    layer.cells["default"].bfloat16()
    assert (layer(x) - base - exact).abs().max() < 0.02 * exact.abs().max()


def test_base_weights_that_are_not_numbers_or_not_floating_are_refused(make_model):
    model = make_model("bert")
    model.bert.encoder.layer[1].attention.self.value.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layer\.1\.attention\.self\.value\.weight holds NaN"):
        get_peft_model(model, config("bert"))
    model = make_model("bert")
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(query.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"query\.weight is torch\.int8"):
        get_peft_model(model, config("bert"))
    assert not any(isinstance(module, KronALayer) for module in model.modules())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query", "vaule"], r"'vaule' is not in the model; did you mean 'value'.*known: .*key"),
        ("nothing.*", r"target_modules nothing\.\* select nothing; known: classifier, dense, key, query, value"),
        (["LayerNorm"], r"LayerNorm' is LayerNorm: only linear layers"),
        (["word_embeddings"], r"word_embeddings' is Embedding: only linear layers"),
    ],
)
def test_targets_that_cannot_be_are_refused(make_model, targets, message):
    with pytest.raises(ModelError, match=message):
        get_peft_model(make_model("bert"), config("bert", target_modules=targets))


def test_an_architecture_without_default_targets_is_told_its_names():
    with pytest.raises(ModelError, match="target_modules is needed for this architecture; known: 0"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), KronAConfig(a_shape=(2, 2)))


def test_unmerging_twice_warns(make_model):
    layer = (
        get_peft_model(make_model("bert"), config("bert")).base_model.model.bert.encoder.layer[0].attention.self.query
    )
    with pytest.warns(UserWarning, match="already unmerged"):
        layer.unmerge()


@dataclasses.dataclass
class GateConfig(TunerConfig):
    """A method made for this test: what a further one needs is a config and a cell."""

    peft_name: ClassVar[str] = "testgate"


class GateCell(Cell):
    """Multiplies the output by a trained vector, held one module deeper; it cannot be merged."""

    def __init__(self, config: GateConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Module())
        self.inner[0].gate = nn.Parameter(torch.full((out_features,), 1.5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * self.inner[0].gate


GateLayer, GateTuner = register(GateConfig, GateCell)


def test_a_further_method_is_a_config_and_a_cell(make_model, make_batch, tmp_path):
    batch = make_batch("bert")
    model = get_peft_model(make_model("bert"), GateConfig(target_modules=["dense"]), adapter_name="mine").eval()
    train(model, batch)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path / "mine").eval()
    close(loaded(**batch).logits, expected, 5e-6)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ModelError, match=r"GateCell at .* cannot be merged"):
            merge()
    close(model(**batch).logits, expected, 5e-6)
