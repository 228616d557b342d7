"""Every method on every architecture: it conforms, or it refuses with the reason given here."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

from pareto_core import ParetoError
from pareto_core.testing import check_method, entry_point_methods, load_method
from pareto_core.tiny import Architecture, TinyTask

NAMES = entry_point_methods("pareto_adapters")
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

#: fields of a method whose defaults are for larger models than the tiny ones
SETTINGS: dict[str, dict[str, Any]] = {
    "compacter": {"reduction_factor": 12},
    "r_loda": {"rank": 24},
    "r_loda_plus": {"rank": 24},
}

NO_TEXT = "for causal language models: .* generates no text"
NO_DECODER = "for causal language models: T5ForConditionalGeneration answers a text"
#: why a method refuses an architecture
REFUSED: dict[str, dict[str, str]] = {
    "one_shot": {"bert": NO_TEXT, "vit": NO_TEXT, "t5": NO_DECODER},
    "prefix_tuning": {
        "vit": "the layers of ViTForImageClassification read no keys and values but their own",
        "t5": "give several layers of its decoder one part of the prefix",
    },
    "prelayer": {"bert": NO_TEXT, "vit": NO_TEXT, "t5": NO_DECODER},
}


def tiny(name: str, **fields: Any) -> Any:
    return load_method(name)(**SETTINGS.get(name, {}), **fields)


class RoomyTask(TinyTask):
    """The tiny task, with positions for a prefix in front of BERT's texts as the decoders have them."""

    def backbone(self) -> nn.Module:
        model: Any = super().backbone()
        if self.architecture == "bert":
            model.config.max_position_embeddings = 2 * self.length
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = type(model)(model.config)
        return model


def task_of(architecture: Architecture) -> TinyTask:
    return RoomyTask(architecture=architecture, hidden=96)  # KronA's (32, 24) divides it


def test_what_is_said_here_is_said_of_methods_that_exist():
    assert {"bitfit", "full", "krona", "lora", "one_shot", "prefix_tuning", "prelayer"} <= set(NAMES)
    assert {*SETTINGS, *REFUSED} <= set(NAMES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_conforms_or_says_why_not(name, architecture):
    method, task = tiny(name), task_of(architecture)
    reason = REFUSED.get(name, {}).get(architecture)
    if reason is None:
        check_method(method, task)
    else:
        with pytest.raises(ParetoError, match=reason):
            method.build(task)


@pytest.mark.parametrize("name", [name for name in NAMES if "train_layer_norms" in load_method(name).field_names()])
def test_conforms_with_layer_norms_trained(name):
    architecture = next(kind for kind in ARCHITECTURES if kind not in REFUSED.get(name, {}))
    check_method(tiny(name, train_layer_norms=True), task_of(architecture))
