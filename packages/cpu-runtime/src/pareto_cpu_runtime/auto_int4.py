"""The chapter's automatic flow as a method: recipes from cheap to dear until one keeps the accuracy.

H. Shen, H. Chang, B. Dong, Y. Luo, H. Meng, "Efficient LLM Inference on CPUs", 2023, https://arxiv.org/abs/2311.00502,
figure 3.1. The search itself is :mod:`pareto_cpu_runtime.quantise.auto`. Recipes are judged on the task's selection
split, so that the evaluation split has no say in the choice.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core import Measurement, Task
from pareto_cpu_runtime.methods import Serving
from pareto_cpu_runtime.quantise.config import GROUP_SIZES

if TYPE_CHECKING:
    from torch import nn

    from pareto_cpu_runtime.quantise import AutoResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoInt4(Serving):
    """The first recipe whose relative loss is at most ``max_relative_loss``, else the one that loses least.

    Recipes are those of :func:`~pareto_cpu_runtime.quantise.auto.default_recipes` at ``group_sizes``, each calibrated
    on ``samples`` rows of ``length`` tokens.
    """

    max_relative_loss: float = 0.01
    group_sizes: tuple[int, ...] = (128, 32)
    samples: int = 128
    length: int = 512
    calibration_seed: int = 0

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self.require("max_relative_loss", 0.0 <= self.max_relative_loss <= 1.0, "must be between 0 and 1")
        allowed = f"name sizes of {', '.join(map(str, GROUP_SIZES))}, none twice"
        sizes = self.group_sizes
        known = bool(sizes) and len(set(sizes)) == len(sizes) and set(sizes) <= set(GROUP_SIZES)
        self.require("group_sizes", known, allowed)
        for field in ("samples", "length"):
            self.require(field, getattr(self, field) >= 1, "must be at least 1")
        self.require("calibration_seed", self.calibration_seed >= 0, "must not be negative")

    def finish(self, model: nn.Module, task: Task) -> Any:
        """Search, pack and deploy the winner; its trials are among the figures."""
        from pareto_cpu_runtime.quantise import auto_quantize
        from pareto_cpu_runtime.quantise.auto import default_recipes

        metric = task.primary_metric

        def evaluate(candidate: Any) -> float:
            return task.score(task.records(candidate, task.selection_split))[metric.name]

        shared = {"samples": self.samples, "length": self.length, "seed": self.calibration_seed}
        recipes = [dataclasses.replace(recipe, **shared) for recipe in default_recipes(model, self.group_sizes)]
        result = auto_quantize(
            model.eval(),
            evaluate,
            self.max_relative_loss,
            calibration=task,
            recipes=recipes,
            higher_is_better=metric.higher_is_better,
        )
        deployed = self.deployed(result.model)
        deployed.search = _summary(result, metric.unit)
        (deployed.files.directory / "search.json").write_text(json.dumps(deployed.search, indent=1) + "\n")
        return deployed

    def load(self, directory: Path) -> Any:
        """Load the winner as these fields say, with what its search found."""
        deployed = super().load(directory)
        deployed.search = json.loads((Path(directory) / "search.json").read_text())
        return deployed

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """Those of any quantised model, the relative loss of the winner and the score of every trial in order."""
        search = deployed.search
        trials = [
            Measurement(name=f"trial.{number}.{trial['name']}", value=trial["score"], unit=search["unit"])
            for number, trial in enumerate(search["trials"], 1)
        ]
        return (
            *super().figures(deployed),
            Measurement(name="search_loss_percent", value=100 * search["loss"], unit="%"),
            Measurement(name="search_target_reached", value=float(search["reached"]), unit=""),
            *trials,
        )


def _summary(result: AutoResult, unit: str) -> dict[str, Any]:
    """What the search found, as JSON."""

    def named(trial: Any) -> dict[str, Any]:
        recipe = trial.recipe
        left = f"-keep{recipe.leave_out_most_sensitive}" if recipe.leave_out_most_sensitive else ""
        return {"name": f"{recipe.method}-g{recipe.group_size}{left}", "score": trial.score, "loss": trial.loss}

    return {
        "unit": unit,
        "source_score": result.source_score,
        "loss": result.best.loss,
        "reached": result.reached,
        "best": named(result.best)["name"],
        "trials": [named(trial) for trial in result.trials],
    }
