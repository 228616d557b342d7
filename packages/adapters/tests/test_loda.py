from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from pareto_adapters import LoDA, LoDAConfig, LoDAPlus, LoDAPlusConfig
from pareto_adapters._build import projections
from pareto_adapters.loda import LoDACell, LoDALayer, LoDAPlusCell, LoDAPlusLayer, f1, f2
from pareto_core import ConfigError, ModelError
from pareto_core.tiny import TinyTask
from pareto_core.weights import parameter_counts

CONFIGS = [LoDAConfig, LoDAPlusConfig]
CELLS = [(LoDAConfig, LoDACell), (LoDAPlusConfig, LoDAPlusCell)]
KINDS = ["t5", "gpt2", "llama", "bert"]


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give everything that is trained normal values, so that nothing is zero."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model


def adapted(make_model, kind: str, config_type, **options) -> PeftModel:
    model = make_model(kind)
    return get_peft_model(model, config_type(**projections(model, ("q", "v")), **options))


def test_hand_computed():
    """z = (3, 1) passes both hidden layers as (1, -1), up to the norm's epsilon; B scales the second number by ten."""
    expected = {LoDACell: [4.0, 0.0], LoDAPlusCell: [3.0 + 1.0, 10.0 - 8.0]}
    for config_type, cell_type in CELLS:
        cell = cell_type(config_type(r=2, scale=0.5), in_features=2, out_features=2)
        cell.A.data, cell.V1.data, cell.V2.data = (torch.eye(2) for _ in range(3))
        cell.B.data = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
        found = cell(torch.tensor([3.0, 1.0]), torch.tensor([100.0, 200.0])) - torch.tensor([100.0, 200.0])
        torch.testing.assert_close(found, 0.5 * torch.tensor(expected[cell_type]), atol=1e-3, rtol=0)


def leaky(value: torch.Tensor) -> torch.Tensor:
    return value if value.item() >= 0 else 0.8 * value


def hidden(z: list[torch.Tensor], v: torch.Tensor) -> list[torch.Tensor]:
    u = [leaky(sum(z[i] * v[i, j] for i in range(len(z)))) for j in range(len(z))]
    mean = sum(u) / len(u)
    variance = sum((value - mean) ** 2 for value in u) / len(u)
    return [(value - mean) / (variance + 1e-5) ** 0.5 for value in u]


def naive(cell: LoDACell, x: torch.Tensor, plus: bool) -> torch.Tensor:
    """The update of one row, number by number."""
    inputs, outputs = len(cell.A), cell.B.shape[1]
    z = [sum(x[i] * cell.A[i, j] for i in range(inputs)) for j in range(cell.r)]
    f = hidden(hidden(z, cell.V1), cell.V2)
    row = []
    for j in range(outputs):
        linear = sum(z[i] * cell.B[i, j] for i in range(cell.r))
        rest = sum(f[i] * cell.B[i, j] for i in range(cell.r))
        row.append(cell.scale * (linear + (leaky(rest) if plus else rest)))
    return torch.stack(row)


@pytest.mark.parametrize(("config_type", "cell_type"), CELLS)
def test_outputs_and_gradients_equal_loops_over_numbers(config_type, cell_type):
    cell = randomise(cell_type(config_type(r=3, scale=0.7), in_features=5, out_features=4).double())
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    y, weights = torch.randn(2, 2, 4, dtype=torch.float64)
    ours = cell(x, y)
    reference = y + torch.stack([naive(cell, row, cell_type is LoDAPlusCell) for row in x])
    torch.testing.assert_close(ours, reference)
    wanted = (x, cell.A, cell.B, cell.V1, cell.V2)
    mine = torch.autograd.grad((ours * weights).sum(), wanted)
    theirs = torch.autograd.grad((reference * weights).sum(), wanted)
    for one, other in zip(mine, theirs, strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("zeroed", ["V1", "V2"])
@pytest.mark.parametrize("config_type", CONFIGS)
@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj", "v_proj"]), ("t5", ["q", "v"])])
def test_lora_is_the_special_case_of_a_hidden_layer_of_zeros(
    make_model, make_batch, kind, targets, config_type, zeroed
):
    batch = make_batch(kind)
    ours = randomise(get_peft_model(make_model(kind), config_type(r=3, scale=2.0, target_modules=targets)))
    lora = get_peft_model(make_model(kind), LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    pairs = []
    for name, layer in ours.named_modules():
        if isinstance(layer, (LoDALayer, LoDAPlusLayer)):
            cell, other = layer.cells["default"], lora.get_submodule(name)
            getattr(cell, zeroed).data.zero_()
            a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
            a.data, b.data = cell.A.detach().T.clone(), cell.B.detach().T.clone()
            pairs += [(cell.A, a), (cell.B, b)]
    losses = ours(**batch), lora(**batch)
    torch.testing.assert_close(losses[0].logits, losses[1].logits, atol=1e-6, rtol=1e-5)
    for output in losses:
        output.loss.backward()
    assert pairs
    for mine, theirs in pairs:
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, theirs.grad.T, atol=1e-6, rtol=1e-4)


def test_the_bottleneck_map_is_nothing_at_one_dimension_and_a_sign_at_two():
    torch.manual_seed(0)
    for r, expected in ((1, {0.0}), (2, {-1.0, 1.0})):
        values = f1(torch.randn(50, r), torch.randn(r, r), torch.randn(r, r)).double()
        assert {round(value, 2) for value in values.flatten().tolist()} == expected
    assert len(f1(torch.randn(50, 4), torch.randn(4, 4), torch.randn(4, 4)).unique()) > 100


def test_both_maps_keep_zero():
    v = torch.randn(4, 4)
    assert not f1(torch.randn(3, 4), torch.zeros(4, 4), v).any()
    assert not f1(torch.randn(3, 4), v, torch.zeros(4, 4)).any()
    assert not f1(torch.zeros(3, 4), v, v).any()
    assert f2(torch.tensor([0.0, -1.0, 2.0])).tolist() == pytest.approx([0.0, -0.8, 2.0])


def test_the_image_is_linear_for_loda_and_not_for_its_plus():
    torch.manual_seed(0)
    x = torch.randn(50, 16, dtype=torch.float64)
    ranks = []
    for config_type, cell_type in CELLS:
        cell = randomise(cell_type(config_type(r=3), 16, 12).double())
        update = cell(x, torch.zeros(50, 12, dtype=torch.float64)).detach()
        assert not torch.allclose(cell(2 * x, torch.zeros(50, 12, dtype=torch.float64)), 2 * update)
        ranks.append(int(torch.linalg.matrix_rank(update)))
    assert ranks[0] == 3
    assert ranks[1] > 3


@pytest.mark.parametrize(("config_type", "cell_type"), CELLS)
def test_the_start_is_that_of_lora_and_the_count_that_of_the_chapter(config_type, cell_type):
    torch.manual_seed(0)
    cell = cell_type(config_type(r=4), 1024, 768)
    assert not cell.B.any()
    for weight, inputs in ((cell.A, 1024), (cell.V1, 4), (cell.V2, 4)):
        bound = 1 / math.sqrt(inputs)
        assert 0.7 * bound < weight.abs().max() <= bound
    assert parameter_counts(cell)[0] == 4 * (1024 + 768) + 2 * 4**2
    x, y = torch.randn(5, 1024), torch.randn(5, 768)
    assert torch.equal(cell(x, y), y)


@pytest.mark.parametrize("config_type", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_train_save_load_disable(make_model, make_batch, tmp_path, kind, config_type):
    batch = make_batch(kind)
    plain = make_model(kind).eval()(**batch).logits
    model = adapted(make_model, kind, config_type).eval()
    torch.testing.assert_close(model(**batch).logits, plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(**batch).logits
    assert not torch.allclose(trained, plain)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, plain)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(make_model(kind), tmp_path, low_cpu_mem_usage=low_memory).eval()
        torch.testing.assert_close(again(**batch).logits, trained)
    torch.testing.assert_close(model.unload()(**batch).logits, plain)


@pytest.mark.parametrize("config_type", CONFIGS)
def test_two_adapters(make_model, make_batch, config_type):
    batch = make_batch("llama")
    model = randomise(adapted(make_model, "llama", config_type)).eval()
    first = model(**batch).logits
    model.add_adapter("second", config_type(r=2, target_modules=["q_proj", "k_proj"]))
    torch.testing.assert_close(model(**batch).logits, first)
    model.set_adapter("second")
    assert not torch.allclose(randomise(model, 2)(**batch).logits, first)
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(model(**batch).logits, first)
    assert not any(".second." in key for key in model.state_dict())


def test_parts_of_a_fused_projection(make_model):
    model = randomise(adapted(make_model, "gpt2", LoDAConfig))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert isinstance(layer, LoDALayer)
    x = torch.randn(3, 5, 16)
    change = layer(x) - layer.base_layer(x)
    parts = layer.cells["default"].parts
    assert set(parts) == {"q", "v"}
    torch.testing.assert_close(change[..., :16], parts["q"](x, torch.zeros(3, 5, 16)), atol=1e-5, rtol=1e-5)
    assert not change[..., 16:32].any()
    torch.testing.assert_close(change[..., 32:], parts["v"](x, torch.zeros(3, 5, 16)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config_type", CONFIGS)
def test_weights_partitioned_by_zero_3_are_not_looked_at(make_model, config_type):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data = torch.empty(0)
    tuned = get_peft_model(model, config_type(r=3, target_modules=["v_proj"]))
    cell = tuned.base_model.model.model.layers[1].self_attn.v_proj.cells["default"]
    assert (cell.A.shape, cell.B.shape) == ((16, 3), (3, 8))


@pytest.mark.parametrize("config_type", CONFIGS)
def test_bf16_and_checkpointing(make_model, make_batch, config_type):
    model = randomise(adapted(make_model, "llama", config_type).bfloat16())
    output = model(**make_batch("llama"))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    gradients = []
    for checkpointing in (False, True):
        model = randomise(adapted(make_model, "llama", config_type)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(**make_batch("llama")).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_injection_and_the_loading_of_transformers(make_model, make_batch, tmp_path):
    batch = make_batch("bert")
    config = LoDAConfig(target_modules=["query", "value"])
    assert any("loda_cell" in key for key in inject_adapter_in_model(config, make_model("bert")).state_dict())
    model = make_model("bert")
    model.add_adapter(config, adapter_name="a")
    expected = randomise(model).eval()(**batch).logits
    model.save_pretrained(tmp_path)
    other = make_model("bert")
    other.load_adapter(tmp_path, adapter_name="b")
    torch.testing.assert_close(other.eval()(**batch).logits, expected)


@pytest.mark.parametrize("config_type", CONFIGS)
def test_merging_is_refused_and_changes_nothing(make_model, config_type):
    model = randomise(adapted(make_model, "t5", config_type))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ModelError, match=r"Cell at .* cannot be merged"):
            merge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("owner", [LoDAConfig, LoDAPlusConfig, LoDA, LoDAPlus])
@pytest.mark.parametrize(("field", "value"), [("r", 0), ("r", 1.5), ("r", True), ("scale", math.inf), ("scale", "1")])
def test_bad_fields_are_refused_by_name(owner, field, value):
    with pytest.raises(ConfigError, match=rf"{owner.__name__}\.{field} = "):
        owner(**{field: value})


@pytest.mark.parametrize(("method", "layer"), [(LoDA(scale=8.0), LoDALayer), (LoDAPlus(r=2), LoDAPlusLayer)])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_deployed_model_keeps_the_adapters(tmp_path, architecture, method, layer):
    task = TinyTask(architecture=architecture)
    model = method.build(task)
    cells = [m.cells["default"] for m in model.modules() if isinstance(m, layer)]
    assert len(cells) == (4 if architecture == "bert" else 2)
    randomise(model)
    batch = next(iter(task.batches("test", 4, 0)))
    expected = model(**batch).logits
    deployed = method.finish(model, task)
    assert type(deployed) is type(task.backbone())
    method.save(deployed, tmp_path)
    torch.testing.assert_close(method.load(tmp_path)(**batch).logits, expected)
    with pytest.raises(ModelError, match="holds no adapters"):
        method.finish(task.backbone(), task)
