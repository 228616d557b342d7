"""The automatic flow: recipes from cheap to dear, until one keeps the accuracy.

The loop of figure 3.1 of "Efficient LLM Inference on CPUs" (H. Shen, H. Chang, B. Dong, Y. Luo, H. Meng, 2023,
https://arxiv.org/abs/2311.00502): quantise, evaluate, and go on to the next recipe while the loss is above the target.
Every trial is a line of JSON in ``trials.jsonl`` of the directory; a trial that is there is not run again.
Calibration is asked for by the first recipe that looks at activations, not before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pareto_core.config import Config
from pareto_core.errors import ConfigError, DataError
from pareto_cpu_runtime.quantise.calibration import Calibration, calibration_tokens
from pareto_cpu_runtime.quantise.config import QuantisationConfig
from pareto_cpu_runtime.quantise.flow import quantise
from pareto_cpu_runtime.quantise.matrix import QuantisedModel
from pareto_cpu_runtime.quantise.operators import operators

TRIALS = "trials.jsonl"
#: shares of the operators that the last recipes leave out, the most sensitive first
_LEFT_OUT = (0.05, 0.15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Config):
    """One recipe's outcome: its score, relative loss against the source (0.01 is 1 %), time and bytes.

    ``seconds`` is the time to quantise and evaluate, ``packed_bytes`` the size of the quantised model.
    """

    recipe: QuantisationConfig
    score: float
    loss: float
    seconds: float
    packed_bytes: int


@dataclasses.dataclass(frozen=True)
class AutoResult:
    """The winner, its trial, all trials in order, the source's score, and whether the target was reached.

    Where no recipe reached the target, ``model`` is of the one with the least loss.
    """

    model: QuantisedModel
    best: Trial
    trials: tuple[Trial, ...]
    source_score: float
    reached: bool

    def __str__(self) -> str:
        what = "reached the target" if self.reached else "no recipe reached the target; the best is given"
        recipe = self.best.recipe
        name = f"{recipe.method}, {recipe.bits} bits, group {recipe.group_size}"
        return f"{what}: {name}, score {self.best.score:g} against {self.source_score:g} (loss {self.best.loss:.2%})"


def default_recipes(model: Any, group_sizes: Sequence[int] = (128, 32)) -> list[QuantisationConfig]:
    """Return the recipes for ``model`` from cheap to dear.

    RTN at each group size, then GPTQ, AWQ and AutoRound at each, then AutoRound at the smallest with the most sensitive
    operators left out. A group size that does not divide some operator's inputs is passed over. No recipe is there
    twice: in a small model the shares that are left out may be the same operators.
    """
    inputs = {module.weight.shape[int(isinstance(module, torch.nn.Linear))] for module in operators(model).values()}
    sizes = [size for size in group_sizes if all(k % size == 0 for k in inputs)]
    if not sizes:
        raise ConfigError(
            "default_recipes", "group_sizes", tuple(group_sizes), f"none divides all inputs {sorted(inputs)}"
        )
    recipes = [QuantisationConfig(method="rtn", group_size=size) for size in sizes]
    recipes += [
        QuantisationConfig(method=method, group_size=size) for method in ("gptq", "awq", "autoround") for size in sizes
    ]
    count = len(operators(model))
    for left in dict.fromkeys(max(1, round(count * share)) for share in _LEFT_OUT):
        recipes.append(QuantisationConfig(method="autoround", group_size=min(sizes), leave_out_most_sensitive=left))
    return recipes


def auto_quantize(
    model: Any,
    evaluate: Callable[[Any], float],
    max_relative_loss: float = 0.01,
    *,
    calibration: Calibration | None = None,
    recipes: Sequence[QuantisationConfig] | None = None,
    directory: Path | None = None,
    higher_is_better: bool = True,
    report: Callable[[Trial], None] | None = None,
) -> AutoResult:
    """Try ``recipes`` in order until one loses at most ``max_relative_loss`` of the source's score.

    ``evaluate`` scores a transformers model; where lower scores are better (perplexity, bits per byte) say
    ``higher_is_better=False``. With ``directory`` finished trials are kept, and not run again for the same model,
    calibration and recipe: the search goes on where it was broken off. ``evaluate`` itself is not part of what is
    compared: take another directory for another evaluation. ``report`` is called after each trial. ``calibration`` is
    needed once the recipes that look at weights alone (RTN) have missed the target.

    Raises :class:`ConfigError` for a target outside 0 … 1 or no recipes, :class:`DataError` where a score is not a
    number, the source's is 0, the directory's trials are damaged, or a recipe needs calibration and there is none; the
    message then says what the recipes before it lost.
    """
    if not 0.0 <= max_relative_loss <= 1.0:
        raise ConfigError("auto_quantize", "max_relative_loss", max_relative_loss, "must be between 0 and 1")
    tried = default_recipes(model) if recipes is None else list(recipes)
    if not tried:
        raise ConfigError("auto_quantize", "recipes", recipes, "must hold at least one")
    tokens = _tokens_once(calibration, tried, model)
    if tokens is None and tried[0].calibrated:
        raise _needs_calibration(tried[0], [])
    journal = _Journal(directory, _fingerprint(model, higher_is_better), _tokens_fingerprint(tokens))
    source = journal.source_score()
    if source is None:
        source = _score(evaluate, model, "the source model")
        journal.add({"source_score": source})
    if source == 0.0:
        raise DataError("the source model scores 0: no relative loss can be taken")
    trials: list[Trial] = []
    winner: tuple[Trial, QuantisedModel] | None = None
    for recipe in tried:
        if recipe.calibrated and tokens is None:
            raise _needs_calibration(recipe, trials)
        trial, quantised = journal.trial(recipe), None
        if trial is None:
            trial, quantised = _try(model, evaluate, tokens, recipe, source, higher_is_better)
            journal.add_trial(trial)
        trials.append(trial)
        if report is not None:
            report(trial)
        if winner is None or trial.loss < winner[0].loss:
            winner = (trial, quantised)  # type: ignore[assignment]
        if trial.loss <= max_relative_loss:
            winner = (trial, quantised)  # type: ignore[assignment]
            break
    assert winner is not None
    best, found = winner
    if found is None:  # its trial was made in an earlier run
        found = quantise(model, tokens, best.recipe)
    return AutoResult(found, best, tuple(trials), source, best.loss <= max_relative_loss)


def _try(
    model: Any,
    evaluate: Callable[[Any], float],
    tokens: torch.Tensor | None,
    recipe: QuantisationConfig,
    source: float,
    higher_is_better: bool,
) -> tuple[Trial, QuantisedModel]:
    start = time.monotonic()
    quantised = quantise(model, tokens, recipe)
    score = _score(evaluate, quantised.dequantise(), f"the model quantised by {recipe.method}")
    loss = (source - score) / abs(source) * (1 if higher_is_better else -1)
    seconds = time.monotonic() - start
    trial = Trial(recipe=recipe, score=score, loss=loss, seconds=seconds, packed_bytes=quantised.packed_bytes)
    return trial, quantised


def _score(evaluate: Callable[[Any], float], model: Any, what: str) -> float:
    score = float(evaluate(model))
    if not math.isfinite(score):
        raise DataError(f"evaluate gave {score} for {what}: expected a finite number")
    return score


def _needs_calibration(recipe: QuantisationConfig, trials: Sequence[Trial]) -> DataError:
    losses = [f"{trial.recipe.method} in groups of {trial.recipe.group_size} lost {trial.loss:.2%}" for trial in trials]
    so_far = f" So far: {', '.join(losses)}." if losses else ""
    return DataError(
        f"the recipe {recipe.method} in groups of {recipe.group_size} needs calibration, and none is given: pass "
        "calibration= a task, token numbers (rows, length) or batches of them, or recipes= that need none (a higher "
        f"max_relative_loss may do as well).{so_far}"
    )


def _tokens_once(
    calibration: Calibration | None, recipes: Sequence[QuantisationConfig], model: Any
) -> torch.Tensor | None:
    """The calibration as one tensor for the longest recipe: an iterator could be read but once. None where none is
    given or none needed."""
    calibrated = [recipe for recipe in recipes if recipe.calibrated]
    if not calibrated or calibration is None:
        return None
    most = max(calibrated, key=lambda recipe: recipe.samples * recipe.length)
    return calibration_tokens(calibration, most, model)


def _fingerprint(model: Any, higher_is_better: bool) -> str:
    """A hash of the weights and the direction: trials of different ones are not mixed."""
    digest = hashlib.sha256(str(higher_is_better).encode())
    for name, tensor in model.state_dict().items():
        _hash_into(digest, name, tensor)
    return digest.hexdigest()


def _tokens_fingerprint(tokens: torch.Tensor | None) -> str:
    """A hash of the calibration, which trials of calibrated recipes are kept under; empty without one."""
    if tokens is None:
        return ""
    digest = hashlib.sha256()
    _hash_into(digest, "tokens", tokens)
    return digest.hexdigest()


def _hash_into(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():
        digest.update(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))


class _Journal:
    """``trials.jsonl``: lines of one model's search, written as they come; nothing where there is no directory."""

    def __init__(self, directory: Path | None, fingerprint: str, calibration: str) -> None:
        self.fingerprint, self.calibration = fingerprint, calibration
        self.path = None if directory is None else Path(directory) / TRIALS
        self.lines: list[dict[str, Any]] = []
        if self.path is not None and self.path.is_file():
            self.lines = [line for line in self._read(self.path) if line.get("model") == fingerprint]

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        found = []
        texts = path.read_text().split("\n")
        for number, text in enumerate(texts, 1):
            try:
                found.append(dict(json.loads(text)))
            except (ValueError, TypeError) as error:
                if number == len(texts):  # no newline behind it: a run was broken off while it wrote
                    break
                raise DataError(
                    f"{path}, line {number} is damaged ({error}): remove it to run that trial again"
                ) from error
        return found

    def source_score(self) -> float | None:
        """The source's score, None where it is not known yet."""
        return next((float(line["source_score"]) for line in self.lines if "source_score" in line), None)

    def trial(self, recipe: QuantisationConfig) -> Trial | None:
        """The finished trial of ``recipe``, None where there is none."""
        for line in self.lines:
            if "trial" in line and line.get("calibration") == self._calibration_of(recipe):
                trial = Trial.from_json(line["trial"])
                if trial.recipe == recipe:
                    return trial
        return None

    def _calibration_of(self, recipe: QuantisationConfig) -> str:
        """What a trial depends on beside the model: nothing where the recipe looks at weights alone."""
        return self.calibration if recipe.calibrated else ""

    def add_trial(self, trial: Trial) -> None:
        """Append a trial, with the calibration that it depends on."""
        self.add({"calibration": self._calibration_of(trial.recipe), "trial": trial.to_json()})

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line, at once on disk; a line that was broken off is written over."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            kept = file.read().rpartition(b"\n")
            file.truncate(len(kept[0]) + len(kept[1]))
            file.write(json.dumps({"model": self.fingerprint, **entry}).encode() + b"\n")
