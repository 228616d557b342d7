from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pareto_core import ConfigError, DataError, Record
from pareto_cpu_runtime.tasks.geometry import Geometry
from pareto_cpu_runtime.tasks.harness import Harness, _records

TASK = Geometry(geometry="small", items=2, length=8, prompt=4, long_prompt=9, new_tokens=2)


def test_a_random_decoder_of_a_published_shape() -> None:
    model: Any = TASK.backbone()
    again: Any = TASK.backbone()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (model.config.hidden_size, model.config.num_key_value_heads) == (256, 2)
    records = TASK.records(model, "test")
    assert TASK.score(records)["nats_per_token"] == pytest.approx(math.log(2048), rel=0.1)
    text = next(iter(TASK.batches("test", 1, 0)))["input_ids"]
    with torch.no_grad():
        nats = model(text).logits[0, :-1].double().log_softmax(-1).gather(-1, text[0, 1:, None]).sum()
    assert records[0].log_probability == pytest.approx(float(nats), rel=1e-5)
    assert {name: r.inputs["input_ids"].shape for name, r in TASK.requests().items()} == {
        "forward": (1, 4),
        "generate": (1, 4),
        "forward_long": (1, 9),
        "generate_long": (1, 9),
    }


def test_tinyllama_has_its_published_number_of_weights() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Geometry().config)
    assert sum(p.numel() for p in model.parameters()) == 1_100_048_384


def test_the_mean_is_over_tasks_not_items() -> None:
    records = [
        *_records("a", [{"doc_id": i, "acc": float(i == 0)} for i in range(4)]),
        *_records("b", [{"doc_id": 0, "acc": 1.0}]),
        *_records("w", [{"doc_id": 0, "word_perplexity": (-4.0, 2)}, {"doc_id": 1, "word_perplexity": (-2.0, 1)}]),
    ]
    task = Harness(tasks=("a", "b", "w"))
    assert task.score(records) == pytest.approx(
        {"accuracy": 62.5, "a_accuracy": 25.0, "b_accuracy": 100.0, "w_word_perplexity": math.exp(2.0)}
    )
    assert task.units == dict.fromkeys(["a_word_perplexity", "b_word_perplexity", "w_word_perplexity"], "")
    with pytest.raises(DataError, match="no accuracy and no word perplexity"):
        list(_records("g", [{"doc_id": 0, "exact_match": 1.0}]))


def test_bad_fields_are_refused() -> None:
    for field, value in [("geometry", "large"), ("items", 0), ("length", 1), ("seed", -1), ("new_tokens", 1)]:
        with pytest.raises(ConfigError, match=field):
            Geometry.from_json({field: value})
    for field, value in [("tasks", []), ("tasks", ["a", "a"]), ("limit", 0), ("max_length", 1), ("rows", 0)]:
        with pytest.raises(ConfigError, match=field):
            Harness.from_json({field: value})
    with pytest.raises(DataError, match="no records"):
        TASK.score([])
    assert TASK.score([Record("a", label=2.0, log_probability=-3.0)]) == {"nats_per_token": 1.5}
