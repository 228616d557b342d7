"""AWQ, TEQ, SignRound and AutoRound by themselves, and every method on every family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pareto_core.errors import DataError
from pareto_cpu_runtime.quantise.awq import clipped
from pareto_cpu_runtime.quantise.calibration import BlockInputs, calibration_tokens
from pareto_cpu_runtime.quantise.config import AWQConfig, Precision, QuantisationConfig, RoundingConfig, TEQConfig
from pareto_cpu_runtime.quantise.equivalent import apply, find_folds
from pareto_cpu_runtime.quantise.flow import quantise
from pareto_cpu_runtime.quantise.grid import weight_grid
from pareto_cpu_runtime.quantise.moments import Moments, collect
from pareto_cpu_runtime.quantise.rounding import tune
from pareto_cpu_runtime.quantise.rtn import round_to_nearest
from pareto_cpu_runtime.quantise.stage import Stage
from pareto_cpu_runtime.quantise.tuning import fake_quantise, total_loss

CALIBRATED = ["gptq", "awq", "teq", "signround", "autoround"]


def recipe(method: str, **changes: Any) -> QuantisationConfig:
    steps = 15
    return QuantisationConfig(
        method=method,
        group_size=changes.pop("group_size", 32),
        batch_size=4,
        teq=TEQConfig(steps=steps, learning_rate=1e-2, batch=4),
        rounding=RoundingConfig(steps=steps, batch=4),
        **changes,
    )


def stage_of(model: Any, tokens: torch.Tensor, config: QuantisationConfig, index: int = 0) -> Stage:
    inputs = BlockInputs(model)
    hidden, arguments = inputs.first(tokens)
    for i in range(index):
        hidden = arguments[i].run(inputs.blocks[i], hidden).detach()
    block = copy.deepcopy(inputs.blocks[index]).requires_grad_(False)
    found = {name: Precision(group_size=32) for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = arguments[index].run(block, hidden).detach()
    of_rows = {len(tokens): arguments[index], 4: inputs.first(tokens[:4])[1][index]}
    return Stage("block", block, found, hidden, targets, of_rows, len(tokens), config)


def error(model: Any, quantised: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        expected = model(tokens).logits
        return float((quantised.dequantise()(tokens).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", CALIBRATED)
def test_every_family_by_every_method(any_model: Any, tokens: torch.Tensor, method: str) -> None:
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    quantised = quantise(any_model, tokens, recipe(method))
    plain = quantise(any_model, config=recipe("rtn"))
    assert set(quantised.matrices) == set(plain.matrices)
    for name, matrix in quantised.matrices.items():
        matrix.check(name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())
    # On what it was calibrated on, no method is worse than rounding (a little luck aside, block after block).
    slack = 1.02 if method in ("gptq", "signround", "autoround") else 1.08
    assert error(any_model, quantised, tokens) < slack * error(any_model, plain, tokens)


@pytest.mark.parametrize(
    ("method", "most"), [("gptq", 0.85), ("awq", 0.95), ("teq", 1.0), ("signround", 0.9), ("autoround", 0.9)]
)
@pytest.mark.parametrize("changes", [{}, {"bits": 3}, {"symmetric": False}, {"group_size": "channel"}])
def test_methods_gain_on_unseen_tokens_too(
    model_of: Callable[..., Any], method: str, most: float, changes: dict[str, Any]
) -> None:
    model = model_of("llama")
    generator = torch.Generator().manual_seed(9)
    tokens, unseen = (
        torch.randint(0, 64, (96, 24), generator=generator),
        torch.randint(0, 64, (32, 24), generator=generator),
    )
    plain = error(model, quantise(model, config=recipe("rtn", **changes)), unseen)
    found = error(model, quantise(model, tokens, recipe(method, **changes)), unseen)
    assert found < most * plain


@pytest.mark.parametrize("family", ["llama", "neox", "gptj", "falcon-alibi"])
def test_folds_leave_the_block_as_it_was(model_of: Callable[..., Any], tokens: torch.Tensor, family: str) -> None:
    stage = stage_of(model_of(family), tokens, recipe("awq"))
    folds = find_folds(stage)
    generator = torch.Generator().manual_seed(0)
    for fold in folds:
        apply(stage, fold, torch.rand(stage.weight(fold.operators[0]).shape[1], generator=generator) + 0.5)
    torch.testing.assert_close(stage.call(stage.module, stage.inputs), stage.targets, rtol=1e-3, atol=1e-4)
    expected = {
        "llama": {("mlp.up_proj", ("mlp.down_proj",)), "input_layernorm", "post_attention_layernorm"},
        "neox": {"input_layernorm", "post_attention_layernorm"},
        "gptj": {("attn.v_proj", ("attn.out_proj",)), "ln_1"},
        "falcon-alibi": {"input_layernorm", "post_attention_layernorm"},
    }[family]
    found = {
        fold.producer if "norm" in fold.producer or "ln" in fold.producer else (fold.producer, fold.operators)
        for fold in folds
    }
    assert found == expected


def test_a_block_that_folding_would_change_is_left_alone(model_of: Callable[..., Any], tokens: torch.Tensor) -> None:
    stage = stage_of(model_of("llama"), tokens, recipe("awq"))
    norm = stage.module.input_layernorm
    original = stage.module.forward

    def forward(hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return original(hidden, **arguments) + norm(hidden)  # another reader of the norm's output

    stage.module.forward = forward  # type: ignore[method-assign]
    assert "input_layernorm" not in {fold.producer for fold in find_folds(stage)}


def test_moments_are_those_of_the_inputs(model_of: Callable[..., Any], tokens: torch.Tensor) -> None:
    stage = stage_of(model_of("llama"), tokens, recipe("awq"))
    seen: list[torch.Tensor] = []
    stage.module.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 128)))
    groups = [group.operators for group in stage.input_groups()]
    seen.clear()
    moments = collect(stage, groups)["mlp.down_proj"]
    x = torch.cat(seen).double()
    torch.testing.assert_close(moments.gram.double(), x.t() @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.mean.double(), x.abs().mean(0), rtol=1e-5, atol=1e-7)
    assert moments.tokens == tokens.numel()
    change = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    assert moments.error(change) == pytest.approx(float((x @ change.double().t()).square().sum()), rel=1e-4)
    cells = moments.group_errors(change, 32)
    expected = (x[:, 32:64] @ change[2, 32:64].double()).square().sum()
    assert float(cells[2, 1]) == pytest.approx(float(expected), rel=1e-4)
    assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") in groups


def test_clipping_never_adds_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    weight = torch.randn(8, 64, generator=generator)
    weight[:, 3] *= 6
    x[:, 3] *= 0.01  # a large weight that hardly matters
    moments = Moments(x.t() @ x, x.abs().mean(0), 200)
    for precision in (Precision(group_size=32), Precision(group_size="channel", symmetric=False)):
        ours = moments.error(clipped(weight, moments, precision, AWQConfig()).dequantise() - weight)
        plain = moments.error(round_to_nearest(weight, precision).dequantise() - weight)
        assert ours < 0.85 * plain


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_learned_rounding_lowers_the_loss_it_is_given(
    model_of: Callable[..., Any], tokens: torch.Tensor, clips: bool, symmetric: bool
) -> None:
    config = recipe("autoround")
    stage = stage_of(model_of("llama"), tokens, config, index=1)
    stage.precisions = {name: Precision(group_size=32, symmetric=symmetric) for name in stage.precisions}
    plain = {n: round_to_nearest(stage.weight(n), p).dequantise() for n, p in stage.precisions.items()}
    with torch.enable_grad():
        tuned = tune(stage, clips)
    assert total_loss(stage, {n: m.dequantise() for n, m in tuned.items()}) < 0.9 * total_loss(stage, plain)
    for name, matrix in tuned.items():
        grid = weight_grid(stage.weight(name), 32, 4, symmetric)
        moved = (matrix.codes - grid.codes(stage.weight(name))).abs().max()
        assert clips or float(moved) == 1  # V moves a weight by one code at most


def test_gradients_pass_rounding() -> None:
    weight = torch.tensor([[-4.0, 1.2, 0.1, 3.0]])
    grid = weight_grid(weight, 4, 4, True)
    offset = torch.zeros(1, 4, requires_grad=True)
    fake_quantise(weight, grid, offset).sum().backward()
    assert offset.grad is not None
    assert offset.grad[0, 1:].tolist() == [0.5, 0.5, 0.5]  # the scale


def test_the_same_seed_gives_the_same_codes(model_of: Callable[..., Any], tokens: torch.Tensor) -> None:
    model = model_of("llama")
    torch.manual_seed(5)
    one = quantise(model, tokens, recipe("autoround"))
    torch.manual_seed(6)
    two = quantise(model, tokens, recipe("autoround"))
    assert all(torch.equal(one.matrices[n].codes, two.matrices[n].codes) for n in one.matrices)


def test_bf16_models(model_of: Callable[..., Any], tokens: torch.Tensor) -> None:
    model = model_of("llama")
    for method in ("rtn", "awq", "gptq"):
        quantised = quantise(copy.deepcopy(model).bfloat16(), tokens, recipe(method))
        assert error(model, quantised, tokens) < 1.2 * error(model, quantise(model, tokens, recipe(method)), tokens)


def test_calibration_forms(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    config = QuantisationConfig(method="gptq", samples=3, length=10, group_size=32)
    stream = torch.arange(60)
    rows = calibration_tokens([{"input_ids": stream[:36].view(3, 12)}, stream[36:]], config, model)
    assert torch.equal(rows, stream[:30].view(3, 10))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.tensor([[5, 6, 0], [7, 0, 0]]), "attention_mask": mask}
    assert calibration_tokens([batch], config, model).tolist() == [[5, 6, 7]]
    assert calibration_tokens(torch.ones(2, 100, dtype=torch.int), config, model).shape == (3, 10)
    assert calibration_tokens(torch.ones(5, 8, dtype=torch.int), config, model).shape == (3, 8)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "the method 'gptq' needs calibration"),
        ([], "holds no tokens"),
        (torch.full((2, 8), 64), "from 64 to 64, the model's vocabulary from 0 to 63"),
        (torch.full((2, 8), -1), "from -1"),
        ([{"labels": torch.ones(2)}], "has no input_ids; it has labels"),
        ([torch.ones(2, 3)], "must be whole numbers"),
    ],
)
def test_bad_calibration(model_of: Callable[..., Any], calibration: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        quantise(model_of("llama"), calibration, recipe("gptq"))
