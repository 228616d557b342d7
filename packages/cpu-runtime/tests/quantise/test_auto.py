from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pareto_core.errors import ConfigError, DataError
from pareto_cpu_runtime.quantise.auto import TRIALS, auto_quantize, default_recipes
from pareto_cpu_runtime.quantise.config import QuantisationConfig
from pareto_cpu_runtime.quantise.flow import quantise
from pareto_cpu_runtime.quantise.sensitivity import rank

RECIPES = [
    QuantisationConfig(bits=3, group_size="channel"),
    QuantisationConfig(bits=4, group_size=32),
    QuantisationConfig(bits=8, group_size=32),
    QuantisationConfig(bits=8, group_size=64),
]


class Evaluation:
    """Closeness of a model's logits to the source's: 1 for the source; lower the worse. Counts its calls."""

    def __init__(self, model: Any, tokens: torch.Tensor, higher_is_better: bool = True) -> None:
        self.tokens, self.higher, self.calls = tokens, higher_is_better, 0
        with torch.no_grad():
            self.expected = model(tokens).logits

    def __call__(self, model: Any) -> float:
        self.calls += 1
        with torch.no_grad():
            error = float((model(self.tokens).logits - self.expected).norm() / self.expected.norm())
        return 1.0 - error if self.higher else 1.0 + error


@pytest.mark.parametrize("higher", [True, False])
def test_stops_at_the_first_recipe_within_the_target(
    model_of: Callable[..., Any], tokens: torch.Tensor, higher: bool
) -> None:
    model = model_of("llama")
    evaluate = Evaluation(model, tokens, higher)
    seen = []
    result = auto_quantize(model, evaluate, 0.02, recipes=RECIPES, higher_is_better=higher, report=seen.append)
    assert result.reached
    assert [trial.recipe for trial in result.trials] == RECIPES[:3] == [trial.recipe for trial in seen]
    assert result.best.recipe == RECIPES[2]
    assert result.source_score == 1.0
    assert result.trials[0].loss > result.trials[1].loss > 0.02 >= result.best.loss > 0
    assert result.best.packed_bytes == result.model.packed_bytes
    assert evaluate.calls == 4
    assert "reached the target" in str(result)


def test_the_best_is_given_where_none_reaches_the_target(model_of: Callable[..., Any], tokens: torch.Tensor) -> None:
    model = model_of("llama")
    result = auto_quantize(model, Evaluation(model, tokens), 0.0, recipes=[RECIPES[1], RECIPES[0]])
    assert not result.reached
    assert result.best.recipe == RECIPES[1]
    assert result.model.recipe["bits"] == 4
    assert "no recipe reached the target" in str(result)


def test_goes_on_where_it_was_broken_off(model_of: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path) -> None:
    model = model_of("llama")
    evaluate = Evaluation(model, tokens)

    def breaks(candidate: Any) -> float:
        if evaluate.calls == 2:
            raise KeyboardInterrupt
        return evaluate(candidate)

    with pytest.raises(KeyboardInterrupt):
        auto_quantize(model, breaks, 0.02, recipes=RECIPES, directory=tmp_path)
    assert len((tmp_path / TRIALS).read_text().splitlines()) == 2  # the source and the first recipe
    with (tmp_path / TRIALS).open("a") as file:
        file.write('{"model": "brok')  # broken off while it wrote
    result = auto_quantize(model, evaluate, 0.02, recipes=RECIPES, directory=tmp_path)
    assert evaluate.calls == 4
    assert result.best.recipe == RECIPES[2]
    lines = [json.loads(line) for line in (tmp_path / TRIALS).read_text().splitlines()]
    assert len(lines) == 4
    assert {"recipe", "score", "loss", "seconds", "packed_bytes"} == set(lines[-1]["trial"])

    again = auto_quantize(model, evaluate, 0.02, recipes=RECIPES, directory=tmp_path)
    assert evaluate.calls == 4  # nothing is evaluated twice
    assert again.trials == result.trials
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(again.model.matrices[name].codes, result.model.matrices[name].codes)


def test_another_model_starts_anew(model_of: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path) -> None:
    for seed in (0, 1):
        model = model_of("llama", seed=seed)
        evaluate = Evaluation(model, tokens)
        auto_quantize(model, evaluate, 0.5, recipes=RECIPES[2:], directory=tmp_path)
        assert evaluate.calls == 2


def test_bad_arguments(model_of: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path) -> None:
    model = model_of("llama")
    with pytest.raises(ConfigError, match="max_relative_loss = 2"):
        auto_quantize(model, lambda _: 1.0, 2)
    with pytest.raises(ConfigError, match="at least one"):
        auto_quantize(model, lambda _: 1.0, recipes=[])
    with pytest.raises(DataError, match="gave nan for the source model"):
        auto_quantize(model, lambda _: math.nan, recipes=RECIPES)
    with pytest.raises(DataError, match="scores 0"):
        auto_quantize(model, lambda _: 0.0, recipes=RECIPES)
    with pytest.raises(DataError, match="needs calibration"):
        auto_quantize(model, lambda _: 1.0, recipes=[QuantisationConfig(method="gptq", group_size=32)])
    (tmp_path / TRIALS).write_text("nonsense\n{}\n")
    with pytest.raises(DataError, match=r"trials\.jsonl, line 1 is damaged"):
        auto_quantize(model, lambda _: 1.0, recipes=RECIPES, directory=tmp_path)


def test_default_recipes_go_from_cheap_to_dear(model_of: Callable[..., Any]) -> None:
    recipes = default_recipes(model_of("llama"))
    assert [(r.method, r.group_size) for r in recipes[:2]] == [("rtn", 32), ("gptq", 32)]  # 128 does not divide 64
    wide = default_recipes(model_of("llama", width=128))
    assert [(r.method, r.group_size) for r in wide[:3]] == [("rtn", 128), ("rtn", 32), ("gptq", 128)]
    assert wide[-1].leave_out_most_sensitive > wide[-2].leave_out_most_sensitive > 0
    with pytest.raises(ConfigError, match="none divides"):
        default_recipes(model_of("llama"), (1024,))


def test_the_most_sensitive_operators_are_left_out(model_of: Callable[..., Any], tokens: torch.Tensor) -> None:
    model = model_of("llama")
    with torch.no_grad():  # one huge weight per row makes the rest of the row vanish in a channel's scale
        model.model.layers[1].mlp.up_proj.weight[:, 0] = 50.0
    config = QuantisationConfig(group_size="channel", leave_out=("lm_head",))
    ranked = rank(model, tokens, config)
    assert len(ranked) == 14
    assert [error for _, error in ranked] == sorted((error for _, error in ranked), reverse=True)
    name, error = ranked[0]
    # By hand, for the first: what its rounding does to its own outputs.
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
        handle.remove()
        rounded = quantise(model, config=config).matrices[name].dequantise()
        plain = seen[0] @ module.weight.t()
        assert error == pytest.approx(float((seen[0] @ rounded.t() - plain).norm() / plain.norm()), rel=1e-3)
    left = QuantisationConfig(group_size="channel", leave_out=("lm_head",), leave_out_most_sensitive=2)
    assert set(quantise(model, tokens, left).left_out) == {"lm_head", ranked[0][0], ranked[1][0]}


def test_calibration_is_asked_for_by_the_first_recipe_that_needs_it(
    model_of: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = model_of("llama")
    evaluate = Evaluation(model, tokens)
    assert auto_quantize(model, evaluate, 1.0).best.recipe.method == "rtn"  # as the README calls it
    calibrated = QuantisationConfig(method="gptq", group_size=32, samples=8, length=24)
    recipes = [RECIPES[0], RECIPES[1], calibrated]
    evaluate.calls = 0
    with pytest.raises(DataError, match=r"gptq in groups of 32 needs calibration.*pass calibration=") as caught:
        auto_quantize(model, evaluate, 0.0, recipes=recipes, directory=tmp_path)
    assert "rtn in groups of channel lost" in str(caught.value)
    assert "rtn in groups of 32 lost" in str(caught.value)
    assert evaluate.calls == 3
    # What was found is not looked for again once there is calibration.
    result = auto_quantize(model, evaluate, 0.0, recipes=recipes, directory=tmp_path, calibration=tokens)
    assert [trial.recipe for trial in result.trials] == recipes
    assert evaluate.calls == 4
    # Another calibration is another trial, of the calibrated recipe alone.
    auto_quantize(model, evaluate, 0.0, recipes=recipes, directory=tmp_path, calibration=tokens.flip(0))
    assert evaluate.calls == 5
    with pytest.raises(DataError, match="needs calibration"):  # before the source is evaluated
        auto_quantize(model, evaluate, 0.0, recipes=[calibrated])
    assert evaluate.calls == 5


def test_no_default_recipe_is_there_twice(model_of: Callable[..., Any]) -> None:
    small = default_recipes(model_of("llama", layers=1, width=128), (32, 64))
    assert len({recipe.canonical() for recipe in small}) == len(small)
    assert [(r.group_size, r.leave_out_most_sensitive) for r in small[-2:]] == [(64, 0), (32, 1)]
    last = default_recipes(model_of("llama", layers=4, width=128), (32, 64))[-2:]
    assert [(r.method, r.group_size, r.leave_out_most_sensitive) for r in last] == [
        ("autoround", 32, 1),
        ("autoround", 32, 4),
    ]
