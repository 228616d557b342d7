from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks" / "adapters"
#: weight decay, LoRA's dropout and the epochs of a row that is not approximated (Hu et al., 2022, table 11; chapter 5)
PAPER = {"loda_e2e": (0.01, 0.1, 5.0), "loda_dart": (0.0, 0.0, 10.0), "loda_bottleneck": (0.01, 0.1, 5.0)}


def stages(name: str) -> dict[str, Any]:
    """The only stage of each variant in the profile ``paper``."""
    benchfile = pytest.importorskip("pareto_runner.benchfile", reason="benchmark files are read by the runner")
    question = benchfile.read(BENCHMARKS / f"{name}.toml")
    ((_, specs),) = benchfile.cases(question, benchfile.Choices(profile="paper", seeds=(0,)))
    found = {}
    for spec in specs:
        (found[spec.variant],) = spec.stages
    return found


@pytest.mark.parametrize("name", PAPER)
def test_paper_profiles_train_every_row_as_table_11_says(name):
    decay, dropout, epochs = PAPER[name]
    for variant, stage in stages(name).items():
        training, (method,) = stage.training, stage.methods
        assert (training.learning_rate, training.batch_size) == (2e-4, 8), variant
        assert (training.warmup_steps, training.schedule, training.gradient_clipping) == (500, "linear", 0.0), variant
        assert (training.optimizer, training.weight_decay) == ("adamw", decay), variant
        approximated = method.name.startswith(("s_loda", "r_loda"))
        assert training.budget.epochs == (10.0 if approximated else epochs), variant
        assert training.select == ("best" if approximated else "last"), variant
        if method.name == "lora":
            assert method.fields.get("dropout", 0.0) == dropout, variant


@pytest.mark.parametrize("name", PAPER)
def test_alpha_is_32_at_every_bottleneck_dimension(name):
    for variant, stage in stages(name).items():
        fields = stage.methods[0].fields
        if "LoDA" in variant:
            assert fields["scale"] * fields.get("r", 4) == 32, variant
        elif "LoRA" in variant:
            assert fields["alpha"] == 32, variant
