"""What all adapters of whole blocks have in common, once over all of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from pareto_adapters import AdapterLConfig, CompacterConfig, HoulsbyConfig, KronABConfig, ParallelAdapterConfig, _peft
from pareto_adapters._peft import BlockConfig, BlockLayer
from pareto_core import ConfigError, ModelError

KINDS = ["bert", "gpt2", "llama", "t5", "vit"]
CONFIGS = {
    "krona_b": lambda **options: KronABConfig(a_shape=(4, 2), **options),
    "krona_b_sequential": lambda blocks=("ffn", "attention"), **options: KronABConfig(
        a_shape=(4, 2), placement="sequential", blocks=list(blocks), biases=2, nonlinearity="silu", **options
    ),
    "krona_b_res": lambda **options: KronABConfig(a_shape=(2, 8), residual="learned", **options),
    "houlsby": lambda **options: HoulsbyConfig(r=3, **options),
    "adapter_l": lambda **options: AdapterLConfig(r=3, **options),
    "parallel_adapter": lambda **options: ParallelAdapterConfig(**options),
    "compacter": lambda **options: CompacterConfig(n=2, reduction_factor=4, **options),
}
#: how far the untrained adapters may move the outputs; KronA^B_res adds a residual connection
AT_START = {"houlsby": 5e-3, "compacter": 1e-5, "krona_b_res": None}

every_method = pytest.mark.parametrize("method", CONFIGS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 5e-6) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def shaken(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with random trainable weights, so that no adapter is the identity."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def wrapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BlockLayer)]


@every_kind
@every_method
def test_one_story_start_train_disable_save_load_refuse_to_merge_unload(make_model, make_batch, tmp_path, method, kind):
    batch = make_batch(kind)
    plain = make_model(kind).eval()(**batch).logits
    model = get_peft_model(make_model(kind), CONFIGS[method]()).eval()
    allowed = AT_START.get(method, 5e-6)
    if allowed is not None:
        close(model(**batch).logits, plain, allowed)
    else:
        assert not torch.allclose(model(**batch).logits, plain, atol=1e-5)
    train(model, batch)
    trained = model(**batch).logits
    assert not torch.allclose(trained, plain, atol=1e-4)
    with model.disable_adapter():
        close(model(**batch).logits, plain)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(make_model(kind), tmp_path, low_cpu_mem_usage=low_memory).eval()
        close(again(**batch).logits, trained)
        assert not any(p.requires_grad for p in again.parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ModelError, match="cannot be merged: use the model as it is"):
            merge()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    base = model.unload()
    close(base(**batch).logits, plain)
    assert base.state_dict().keys() == make_model(kind).state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "ffn", "attention", "layer"),
    [
        ("bert", "bert.encoder.layer.1.output", "bert.encoder.layer.1.attention.output", "bert.encoder.layer.1"),
        ("gpt2", "transformer.h.1.mlp", "transformer.h.1.attn", "transformer.h.1"),
        ("llama", "model.layers.1.mlp", "model.layers.1.self_attn", "model.layers.1"),
        (
            "t5",
            "decoder.block.0.layer.2.DenseReluDense",
            "decoder.block.0.layer.0.SelfAttention",
            "decoder.block.0",
        ),
        ("vit", "vit.layers.1.mlp", "vit.layers.1.attention", "vit.layers.1"),
    ],
)
def test_blocks_are_found_in_every_layer(make_model, kind, ffn, attention, layer):
    for blocks, last in ((["ffn"], [ffn]), (["attention"], [attention]), (["layer"], [layer])):
        found = wrapped(get_peft_model(make_model(kind), ParallelAdapterConfig(blocks=blocks)))
        assert len(found) == 2
        assert found[-1:] == [f"base_model.model.{name}" for name in last]
    both = wrapped(get_peft_model(make_model(kind), ParallelAdapterConfig(blocks=["ffn", "attention"])))
    assert set(both) > {f"base_model.model.{ffn}", f"base_model.model.{attention}"}
    assert len(both) == 4


@every_kind
def test_layers_to_transform_keeps_to_these_layers(make_model, tmp_path, kind):
    for blocks in (["ffn", "attention"], ["layer"]):
        every = wrapped(get_peft_model(make_model(kind), ParallelAdapterConfig(blocks=blocks)))
        model = get_peft_model(make_model(kind), ParallelAdapterConfig(blocks=blocks, layers_to_transform=[0]))
        first = [name for name in every if next(part for part in name.split(".") if part.isdigit()) == "0"]
        assert first == wrapped(model)
        assert (len(first) < len(every)) == (kind != "t5")
        model.save_pretrained(tmp_path)
        assert wrapped(PeftModel.from_pretrained(make_model(kind), tmp_path)) == first


def test_layers_of_a_pattern_that_is_given_are_refused():
    with pytest.raises(ConfigError, match=r"layers_to_transform = .*PEFT ignores it where target_modules is a text"):
        ParallelAdapterConfig(target_modules=".*mlp", layers_to_transform=[0])


@pytest.mark.parametrize("kind", ["bert", "llama"])
@every_method
def test_in_half_precision_and_under_autocast(make_model, make_batch, method, kind):
    for cast in (True, False):
        model = get_peft_model(make_model(kind).bfloat16(), CONFIGS[method](), autocast_adapter_dtype=cast)
        adapter = {p.dtype for p in model.parameters() if p.requires_grad}
        assert adapter == ({torch.float32} if cast else {torch.bfloat16})
        loss = model(**make_batch(kind)).loss
        assert loss.isfinite()
        loss.backward()
    model = shaken(get_peft_model(make_model(kind), CONFIGS[method]()))
    exact = model(**make_batch(kind)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**make_batch(kind)).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_kind
@every_method
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_batch, method, kind):
    found = []
    for checkpointing in (False, True):
        model = shaken(get_peft_model(make_model(kind), CONFIGS[method]()))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**make_batch(kind)).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-5)


@every_method
def test_several_adapters(make_model, make_batch, tmp_path, method):
    batch = make_batch("gpt2")
    model = shaken(get_peft_model(make_model("gpt2"), CONFIGS[method](), adapter_name="one"))
    one = model(**batch).logits
    model.add_adapter("two", CONFIGS[method](layers_to_transform=[0]))
    assert torch.equal(model(**batch).logits, one)
    model.set_adapter("two")
    two = shaken(model)(**batch).logits
    assert not torch.allclose(one, two, atol=1e-3)
    assert all(".two." in name for name, p in model.named_parameters() if p.requires_grad)
    model.base_model.set_adapter(["one", "two"])
    assert not torch.allclose(model(**batch).logits, two, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("gpt2"), tmp_path / "one", adapter_name="renamed").eval()
    assert torch.equal(loaded(**batch).logits, one)
    loaded.load_adapter(tmp_path / "two", adapter_name="two")
    loaded.set_adapter("two")
    assert torch.equal(loaded(**batch).logits, two)
    loaded.delete_adapter("two")
    assert not any(".two." in name for name in loaded.state_dict())
    loaded.set_adapter("renamed")
    assert torch.equal(loaded(**batch).logits, one)


@every_method
def test_inject_and_transformers_own_interface(make_model, make_batch, tmp_path, method):
    batch = make_batch("bert")
    plain = make_model("bert").eval()(**batch).logits
    injected = inject_adapter_in_model(CONFIGS[method](), make_model("bert"))
    assert type(injected) is type(make_model("bert"))
    assert wrapped(injected)
    model = make_model("bert")
    model.add_adapter(CONFIGS[method](), adapter_name="a")
    expected = shaken(model)(**batch).logits
    model.save_pretrained(tmp_path)
    other = make_model("bert")
    other.load_adapter(tmp_path, adapter_name="b")
    assert torch.equal(other.eval()(**batch).logits, expected)
    other.disable_adapters()
    assert torch.equal(other(**batch).logits, plain)
    other.enable_adapters()
    other.delete_adapter("b")
    assert torch.equal(other(**batch).logits, plain)


@every_method
def test_pickle_and_deepcopy(make_model, make_batch, method):
    model = shaken(get_peft_model(make_model("t5"), CONFIGS[method]()))
    expected = model(**make_batch("t5")).logits
    assert torch.equal(copy.deepcopy(model)(**make_batch("t5")).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**make_batch("t5")).logits, expected)


@every_method
def test_compiles_without_graph_breaks(make_model, method):
    model = shaken(get_peft_model(make_model("llama"), CONFIGS[method](blocks=["ffn"])))
    layer = model.get_submodule(wrapped(model)[0])
    x = torch.randn(3, 5, 16)
    close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@every_method
def test_text_is_generated_through_the_adapters(make_model, method):
    model = shaken(get_peft_model(make_model("gpt2"), CONFIGS[method]()))
    prompt = torch.tensor([[5, 6, 7]])
    cached, whole = (
        model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=39)
        for cache in (True, False)
    )
    assert torch.equal(cached, whole)
    with model.disable_adapter():
        assert model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=39).shape[0] == 1


@every_kind
@every_method
def test_meta_device_and_weights_partitioned_by_zero_3(make_model, method, kind):
    with torch.device("meta"):
        model = get_peft_model(make_model(kind), CONFIGS[method]())
    expected = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    partitioned = make_model(kind)
    for parameter in partitioned.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    adapted = get_peft_model(partitioned, CONFIGS[method]())
    found = {name: parameter.shape for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert found == expected


class Int8Linear(nn.Module):
    """Stands for a layer of a quantisation library: its weight is no floating one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_blocks_of_quantised_layers_are_adapted_and_integers_that_peft_does_not_know_refused(
    make_model, make_batch, monkeypatch
):
    model = make_model("llama").bfloat16()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.gate_proj\.weight is torch\.int8"):
        get_peft_model(model, CONFIGS["krona_b"]())
    known = _peft.resolve_quantization_backend
    monkeypatch.setattr(
        _peft, "resolve_quantization_backend", lambda m, **_: "int8" if isinstance(m, Int8Linear) else known(m)
    )
    plain = model.eval()(**make_batch("llama")).logits
    adapted = get_peft_model(model, CONFIGS["krona_b"]())
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    train(adapted, make_batch("llama"))
    assert not torch.equal(adapted(**make_batch("llama")).logits, plain)
    assert torch.equal(adapted.unload()(**make_batch("llama")).logits, plain)


def test_other_adapters_inside_a_wrapped_block_are_refused(make_model):
    for outer, target in (("krona_b", "c_fc"), ("adapter_l", "c_attn")):
        model = get_peft_model(make_model("gpt2"), CONFIGS[outer]())
        before = list(model.state_dict())
        lora = LoraConfig(r=2, target_modules=[target], fan_in_fan_out=True)
        with pytest.raises(ModelError, match=rf"{target}' lies inside a block that .* wraps"):
            get_peft_model(model.get_base_model(), lora)
        assert list(model.state_dict()) == before


def test_lora_inside_first_then_the_block_runs_and_is_not_unloaded_over_it(make_model, make_batch):
    batch = make_batch("gpt2")
    lora = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    inner = get_peft_model(make_model("gpt2"), lora).eval()
    expected = inner(**batch).logits
    outer = get_peft_model(inner.get_base_model(), CONFIGS["krona_b"]()).eval()
    close(outer(**batch).logits, expected)
    with pytest.raises(ModelError, match=r"is around a block that holds .*Linear: unloading would leave that behind"):
        outer.unload()
    close(outer(**batch).logits, expected)


def test_architectures_that_are_not_known_need_target_modules():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x)

    with pytest.raises(ModelError, match=r"blocks of the architecture '?\(?.* are not known .*target_modules"):
        get_peft_model(Net(), ParallelAdapterConfig())
    model = get_peft_model(Net(), ParallelAdapterConfig(target_modules=["mlp"]))
    assert wrapped(model) == ["base_model.model.mlp"]
    assert model(torch.ones(2, 4)).shape == (2, 4)


def test_a_sequential_adapter_of_a_block_that_normalises_its_sum_is_told_where_to_go(make_model):
    with pytest.raises(ModelError, match=r"gives a normalised sum.*target 'bert.*output\.dense'"):
        get_peft_model(make_model("bert"), HoulsbyConfig(target_modules=[r"layer.0.output"]))


def test_on_bert_a_parallel_adapter_reads_what_the_ffn_reads(make_model, make_batch):
    model = shaken(get_peft_model(make_model("bert"), CONFIGS["parallel_adapter"]()))
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0")
    seen = {}
    layer.intermediate.register_forward_pre_hook(lambda _, args: seen.setdefault("ffn", args[0]))
    layer.output.cells["default"].down.register_forward_pre_hook(lambda _, args: seen.setdefault("cell", args[0]))
    model(**make_batch("bert"))
    assert torch.equal(seen["ffn"], seen["cell"])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"blocks": []}, "blocks"),
        ({"blocks": ["ffn", "layer"]}, "blocks"),
        ({"blocks": ["mlp"]}, "blocks"),
        ({"placement": "beside"}, "placement"),
        ({"fused_parts": ["q"]}, "fused_parts"),
    ],
)
def test_bad_fields_are_refused_by_name(options, field):
    with pytest.raises(ConfigError, match=rf"KronABConfig\.{field} = "):
        KronABConfig(**options)


@pytest.mark.parametrize(
    ("config", "placement"),
    [
        (HoulsbyConfig, "parallel"),
        (AdapterLConfig, "parallel"),
        (CompacterConfig, "parallel"),
        (ParallelAdapterConfig, "sequential"),
    ],
)
def test_a_method_keeps_to_its_own_placement(config: type[BlockConfig], placement):
    with pytest.raises(ConfigError, match=rf"{config.__name__}\.placement = '{placement}'"):
        config(placement=placement)
