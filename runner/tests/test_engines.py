"""The engines against a plain loop written here: losses, frozen weights, edits of weights and optimizer state."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pareto_core import Budget, Engine, Method, Training, UnsupportedError
from pareto_core.testing import TinyTask, load_method
from pareto_core.weights import freeze
from pareto_runner import engines as e
from pareto_runner.train import batch_stream, train

STEPS = 6


def training(**changes: Any) -> Training:
    values: dict[str, Any] = {
        "learning_rate": 1e-2,
        "batch_size": 16,
        "budget": Budget(max_steps=STEPS),
        "warmup_steps": 2,
        "weight_decay": 0.1,
    }
    return Training(**{**values, **changes})


def built(trainable: str = "") -> Any:
    model: Any = freeze(TinyTask().backbone())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trainable in name
    return model


def reference_curve(settings: Training, model: Any) -> list[float]:
    """Write the same training down once more, without the package's loop."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=settings.weight_decay)
    factors = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    losses: list[float] = []
    model.train()
    for factor, batch in zip(factors, batch_stream(TinyTask(), settings.batch_size, 3, STEPS), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def run(settings: Training, engine: Engine, trainable: str = "", methods: tuple[Method, ...] = ()) -> Any:
    model = built(trainable)
    loop = e.make_loop(model, settings, engine, "fp32", "cpu", "cpu", lambda: built(trainable))
    done = train(loop, model, TinyTask(), methods, settings, 3, lambda *_: None)
    return done, loop.finish()


@pytest.mark.parametrize(
    ("engine", "accumulation"),
    [("torch", 1), ("torch", 4), (0, 1), (0, 2), (1, 1), (2, 1), (3, 1)],
    ids=["torch", "torch accumulating", "zero0", "zero0 accumulating", "zero1", "zero2", "zero3"],
)
def test_every_engine_follows_the_plain_loop(engine: str | int, accumulation: int) -> None:
    chosen = Engine(name="torch") if engine == "torch" else Engine(zero_stage=engine)  # type: ignore[arg-type]
    settings = training(gradient_accumulation=accumulation)
    done, model = run(settings, chosen)
    assert [loss for _, loss in done.curve] == pytest.approx(reference_curve(settings, built()), abs=2e-5)
    assert done.items == STEPS * 16
    assert done.curve[-1][1] < done.curve[0][1]
    assert next(model.parameters()).shape == next(built().parameters()).shape


TUNERS: dict[str, dict[str, Any]] = {
    "krona": {"a_shape": (8, 6)},
    "krona_b": {"a_shape": (8, 6), "biases": 2},
    "krona_b_res": {"a_shape": (8, 6), "scale": 1.0},
    "houlsby": {"r": 3},
    "adapter_l": {"r": 3},
    "parallel_adapter": {"r": 3},
    "compacter": {"n": 2, "reduction_factor": 8},
    "loda": {},
    "loda_plus": {},
    "s_loda": {},
    "r_loda": {"rank": 12},
}


@pytest.mark.parametrize("name", TUNERS)
def test_partitioned_weights_train_every_tuner_the_same(name: str) -> None:
    method = load_method(name)(**TUNERS[name])
    task = TinyTask()

    def make() -> Any:
        torch.manual_seed(0)
        return method.build(task, task.frozen_backbone())

    losses, weights = [], []
    for engine in (Engine(name="torch"), Engine(zero_stage=3)):
        model = make()
        loop = e.make_loop(model, training(), engine, "fp32", "cpu", "cpu", make)
        losses.append([loss for _, loss in train(loop, model, task, (method,), training(), 3, lambda *_: None).curve])
        weights.append({name: p.detach().clone() for name, p in loop.finish().named_parameters() if p.requires_grad})
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)
    assert weights[1].keys() == weights[0].keys()
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-4)


def test_frozen_parameters_stay_as_they_were() -> None:
    _, model = run(training(), Engine(), trainable="classifier")
    for (name, before), after in zip(built("classifier").named_parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after) != ("classifier" in name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving(Method):
    """Halves the head's bias after each step and zeroes its momentum; notes what it saw."""

    def after_step(self, model: Any, progress: float, edit: Any) -> None:
        bias = next(p for name, p in model.named_parameters() if name.endswith("classifier.bias"))
        value = edit.get(bias)
        edit.set(bias, torch.full_like(value, progress))
        edit.set_state(bias, "exp_avg", torch.zeros_like(value))
        assert torch.equal(edit.get(bias), torch.full_like(value, progress))
        assert float(edit.get_state(bias, "exp_avg").abs().max()) == 0.0


@pytest.mark.parametrize("stage", ["torch", 0, 1, 2, 3])
def test_methods_edit_full_parameters_and_optimizer_state(stage: str | int) -> None:
    engine = Engine(name="torch") if stage == "torch" else Engine(zero_stage=stage)  # type: ignore[arg-type]
    _, model = run(training(), engine, methods=(Halving(),))
    assert model.classifier.bias.tolist() == [1.0, 1.0]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="16 does not divide into 3 processes"):
        e.deepspeed_config(training(), Engine(processes=3), "fp32", 3)


def test_precision_and_optimizer_reach_deepspeed() -> None:
    config = e.deepspeed_config(training(optimizer="adam"), Engine(zero_stage=2), "bf16", 1)
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"] == {"stage": 2}
    assert config["optimizer"]["params"]["adam_w_mode"] is False
