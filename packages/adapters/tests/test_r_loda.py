from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from pareto_adapters import (
    KronAConfig,
    LoDAConfig,
    RLoDA,
    RLoDAPlus,
    approximation,
    energy_by_rank,
    sparsify_projections,
    truncate_projections,
)
from pareto_adapters._build import projections
from pareto_adapters.approximate import self_attentions
from pareto_adapters.loda import LoDALayer, LoDAPlusLayer
from pareto_adapters.r_loda import LowRank, SharedFactor, truncate
from pareto_core import ConfigError, ModelError
from pareto_core.testing import check_method
from pareto_core.tiny import TinyTask
from pareto_core.weights import freeze, weight_bytes

KINDS = ["t5", "gpt2", "llama", "bert"]
RANK = 5


def best(weight: torch.Tensor, rank: int) -> torch.Tensor:
    u, sigma, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ v[:rank]


def dense(model: nn.Module, rank: int) -> nn.Module:
    """``model`` with the weights of its projections replaced by the best approximation, and no layer replaced."""
    for attention in self_attentions(model):
        columns = best(attention.matrix().detach(), rank).float().split(attention.widths, 1)
        for layer, part in zip(attention.layers, columns, strict=True):
            layer.weight.data = part if isinstance(layer, Conv1D) else part.T
    return model


@pytest.mark.parametrize("shape", [(6, 18), (5, 5), (8, 3)])
def test_the_product_is_the_best_of_its_rank(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    w_a, w_b, kept = truncate(weight, 3)
    assert (w_a.shape, w_b.shape) == ((shape[0], 3), (3, shape[1]))
    assert w_a.dtype == w_b.dtype == torch.float32
    expected = best(weight, 3)
    torch.testing.assert_close(w_a @ w_b, expected.float())
    assert kept == pytest.approx(float(expected.square().sum()))
    assert kept / float(weight.double().square().sum()) == pytest.approx(float(energy_by_rank(weight)[2]))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_those_of_dense_weights_of_that_rank(make_model, make_batch, kind):
    batch = make_batch(kind)
    ours, reference = make_model(kind).eval(), dense(make_model(kind), RANK).eval()
    truncate_projections(ours, RANK)
    outputs = ours(**batch), reference(**batch)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    shared = [(name, p) for name, p in ours.named_parameters() if p.requires_grad]
    assert shared
    for name, parameter in shared:
        torch.testing.assert_close(parameter.grad, theirs[name])
    record = approximation(ours)
    assert (record["kind"], record["size"]) == ("low_rank", RANK)
    for attention in self_attentions(make_model(kind)):
        expected = float(energy_by_rank(attention.matrix().detach())[RANK - 1])
        assert record["energy_by_attention"][attention.name] == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_rank_changes_nothing(make_model, make_batch, kind):
    model = make_model(kind).eval()
    before = model(**make_batch(kind)).logits
    truncate_projections(model, 16)
    torch.testing.assert_close(model(**make_batch(kind)).logits, before)
    assert approximation(model)["energy"] == pytest.approx(1.0)


def products(layers: list[nn.Module], inputs: list[torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
    return counter.get_total_flops() // 2


def test_the_product_with_the_input_is_computed_once_for_query_key_and_value(make_model):
    model = make_model("llama")
    truncate_projections(model, RANK)
    attention = self_attentions(model)[0]
    x, other = torch.randn(2, 1, 1, 16)
    first, second = 16 * RANK, RANK * (16 + 8 + 8)
    assert products(attention.layers, [x, x, x]) == first + second
    assert attention.module.W_A._product is None, "nothing is remembered after the third has read"
    assert products(attention.layers, [x, x.clone(), x]) == 3 * first + second
    assert products(attention.layers, [other, other, other]) == first + second
    q, k, v = attention.layers
    assert products([q, q, k, v], [x] * 4) == 2 * first + second + 16 * RANK


def test_inputs_are_told_apart(make_model):
    model = make_model("llama")
    truncate_projections(model, RANK)
    q, k, v = self_attentions(model)[0].layers
    weights = {layer: layer.factor.weight.T @ layer.weight.T for layer in (q, k, v)}
    x, other = torch.randn(2, 3, 16)
    for layer, given in [(q, x), (k, other), (v, other), (q, other), (k, x), (q, x), (v, x), (q, x), (q, x)]:
        torch.testing.assert_close(layer(given), given @ weights[layer])


def test_what_was_not_read_by_all_is_forgotten_when_the_attention_ends(make_model, make_batch):
    model = make_model("llama")
    truncate_projections(model, RANK)
    attentions = self_attentions(model)
    x = torch.randn(1, 2, 16)
    attentions[0].layers[0](x)
    assert attentions[0].module.W_A._product is not None
    attentions[1].layers[2].register_forward_pre_hook(lambda layer, inputs: (inputs[0].clone(),))
    model(**make_batch("llama"))
    assert [attention.module.W_A._product for attention in attentions] == [None, None]


def test_a_product_without_gradients_is_not_read_with_them(make_model):
    model = make_model("bert")
    truncate_projections(model, RANK)
    q, k, _ = self_attentions(model)[0].layers
    x = torch.randn(3, 16, requires_grad=True)
    with torch.no_grad():
        q(x)
    (gradient,) = torch.autograd.grad(k(x).sum(), x)
    torch.testing.assert_close(gradient[0], (k.factor.weight.T @ k.weight.T).sum(1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_batch, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make_model("llama")
        truncate_projections(model, RANK)
        torch.manual_seed(0)
        model = get_peft_model(freeze(model), LoDAConfig(target_modules=["q_proj", "v_proj"])).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**make_batch("llama")).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_pickles_and_dtypes(make_model, make_batch):
    model = make_model("bert").eval()
    truncate_projections(model, RANK)
    expected = model(**make_batch("bert")).logits
    layers = self_attentions(model)[0].layers
    layers[0](torch.randn(2, 16, requires_grad=True) * 2)  # leaves a product with a graph behind
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**make_batch("bert")).logits, expected)
        assert self_attentions(other)[0].layers[0].factor is self_attentions(other)[0].module.W_A
    halved = copy.deepcopy(model).bfloat16()(**make_batch("bert")).logits
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), expected, atol=0.05, rtol=0)
    direct = make_model("bert").bfloat16()
    truncate_projections(direct, RANK)
    assert {p.dtype for p in direct.parameters()} == {torch.bfloat16}


def test_compiles_without_graph_breaks(make_model):
    model = make_model("llama")
    truncate_projections(model, RANK)
    layers = self_attentions(model)[0].layers
    x = torch.randn(3, 16)
    compiled = torch.compile(lambda x: [layer(x) for layer in layers], backend="eager", fullgraph=True)
    for one, layer in zip(compiled(x), layers, strict=True):
        torch.testing.assert_close(one, layer(x))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_adapters_beside_factors_are_saved_loaded_and_unloaded(make_model, make_batch, tmp_path, kind):
    def approximated():
        model = freeze(make_model(kind))
        truncate_projections(model, RANK)
        return model.eval()

    batch = make_batch(kind)
    plain = approximated()(**batch).logits
    fields = projections(make_model(kind), ("q", "v"))
    model = get_peft_model(approximated(), LoDAConfig(**fields)).eval()
    torch.testing.assert_close(model(**batch).logits, plain)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(approximated(), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, expected)
    bare = loaded.unload()
    torch.testing.assert_close(bare(**batch).logits, plain)
    assert sum(isinstance(module, LowRank) for module in bare.modules()) == (2 if kind == "gpt2" else 6)


def test_an_adapter_does_not_load_beside_other_projections_than_its_own(make_model, make_batch, tmp_path):
    """PEFT saves the adapter alone; its configuration knows what it was trained beside."""

    def base(rank: int | None = None, keep: float | None = None) -> nn.Module:
        model = make_model("llama").eval()
        if rank is not None:
            truncate_projections(model, rank)
        if keep is not None:
            sparsify_projections(model, keep)
        return model

    fields = projections(make_model("llama"), ("q", "v"))
    config = LoDAConfig(**fields)
    get_peft_model(base(rank=3), config).save_pretrained(tmp_path / "low_rank")
    get_peft_model(base(), config).save_pretrained(tmp_path / "plain")  # one configuration may serve several models
    get_peft_model(base(keep=0.2), config).save_pretrained(tmp_path / "sparse")
    wrong = {
        "low_rank": (base(), base(rank=4), base(keep=0.2)),
        "plain": (base(rank=3), base(keep=0.2)),
        "sparse": (base(), base(keep=0.3), base(rank=3)),
    }
    for name, models in wrong.items():
        for model in models:
            with pytest.raises(ModelError, match=r"approximated.*approximate the model likewise before loading"):
                PeftModel.from_pretrained(model, tmp_path / name)
    for name, model in {"low_rank": base(rank=3), "plain": base(), "sparse": base(keep=0.2)}.items():
        PeftModel.from_pretrained(model, tmp_path / name)(**make_batch("llama"))


def test_nothing_is_merged_into_factors(make_model):
    model = make_model("llama")
    truncate_projections(model, RANK)
    model = get_peft_model(model, KronAConfig(a_shape=(4, 2), target_modules=["v_proj", "o_proj"], init="normal"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.v_proj' stores no matrix"):
            merge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(model.unload(), LoraConfig(target_modules=["v_proj"]))


def test_the_meta_device_gives_the_structure(make_model):
    with torch.device("meta"):
        model = make_model("llama")
    truncate_projections(model, RANK)
    real = make_model("llama")
    truncate_projections(real, RANK)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert approximation(model) == {"kind": "low_rank", "size": RANK}


@pytest.mark.parametrize("architecture", ["bert", "t5", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("method", [RLoDA(rank=10), RLoDAPlus(rank=10)])
def test_conforms(architecture, method):
    check_method(method, TinyTask(architecture=architecture))


@pytest.mark.parametrize(("method", "layer"), [(RLoDA(rank=6), LoDALayer), (RLoDAPlus(rank=6), LoDAPlusLayer)])
def test_the_deployed_model_is_smaller_and_knows_its_rank(tmp_path, method, layer):
    task = TinyTask(architecture="gpt2")
    model = method.build(task)
    assert sum(isinstance(module, layer) for module in model.modules()) == 2
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    deployed = method.finish(model, task)
    method.save(deployed, tmp_path)
    loaded = RLoDA().load(tmp_path)
    for found in (deployed, loaded):
        assert approximation(found)["size"] == 6
        assert 0 < approximation(found)["energy"] < 1
        saved = weight_bytes(task.backbone()) + 4 * adapters - weight_bytes(found)
        assert saved == 4 * 2 * (48 * 144 - 6 * (48 + 144))


def test_biases_are_those_of_the_projections(make_model):
    model, plain = make_model("bert"), make_model("bert")
    for each in (model, plain):
        for attention in self_attentions(each):
            for number, layer in enumerate(attention.layers):
                layer.bias.data.fill_(number + 1.0)
    truncate_projections(model, RANK)
    for layer, old in zip(self_attentions(model)[0].layers, self_attentions(plain)[0].layers, strict=True):
        assert torch.equal(layer(torch.zeros(1, 16)), old(torch.zeros(1, 16)))


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_below_one_are_refused(make_model, rank):
    for method in (RLoDA, RLoDAPlus):
        with pytest.raises(ConfigError, match=rf"{method.__name__}\.rank = {rank}: must be above 0"):
            method(rank=rank)
    with pytest.raises(ConfigError, match="rank"):
        truncate_projections(make_model("bert"), rank)


@pytest.mark.parametrize("rank", [True, 2.0, "3", None])
def test_ranks_that_are_no_integers_are_refused_and_nothing_is_changed(make_model, rank):
    model = make_model("bert")
    with pytest.raises(ConfigError, match=r"truncate_projections\.rank = .*: must be an integer above 0"):
        truncate_projections(model, rank)
    assert not any(isinstance(module, (LowRank, SharedFactor)) for module in model.modules())


def test_ranks_that_are_too_large_are_refused_and_nothing_is_changed(make_model):
    model = make_model("t5")
    with pytest.raises(ModelError, match=r"rank = 17, but .* 'encoder\.block\.0.*' have rank 16 at most"):
        truncate_projections(model, 17)
    assert not any(isinstance(module, (LowRank, SharedFactor)) for module in model.modules())
    with pytest.raises(ModelError, match="rank = 300"):
        RLoDA().build(TinyTask())
