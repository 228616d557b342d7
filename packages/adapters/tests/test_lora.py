from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from pareto_adapters import LoRA
from pareto_core import ConfigError, ModelError
from pareto_core.testing import TinyTask
from pareto_core.weights import parameter_counts


class TextToText(TinyTask):
    """T5-base without weights, and no head."""

    @property
    def spec(self):
        from pareto_core import TaskSpec

        return TaskSpec()

    def backbone(self):
        with torch.device("meta"):
            return T5ForConditionalGeneration(
                T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
            )


def test_scaling_is_one_by_default_and_alpha_over_r_otherwise():
    task = TinyTask()
    for method, expected in [(LoRA(), 1.0), (LoRA(r=4), 1.0), (LoRA(r=4, alpha=8), 2.0)]:
        query = method.build(task).base_model.model.bert.encoder.layer[0].attention.self.query
        assert query.scaling["default"] == expected
        assert query.lora_A["default"].weight.shape == (method.r, 48)


def test_trainable_share_of_t5_base_is_table_4_5s(monkeypatch):
    monkeypatch.setattr("pareto_adapters._build.check_finite", lambda model: None)
    assert parameter_counts(LoRA().build(TextToText()))[0] == 110_592
    assert parameter_counts(LoRA(train_layer_norms=True).build(TextToText()))[0] == 110_592 + 47_616


def test_merging_adds_the_product_of_the_factors():
    task = TinyTask()
    model = LoRA(r=2, alpha=4).build(task)
    query = model.base_model.model.bert.encoder.layer[1].attention.self.query
    torch.nn.init.normal_(query.lora_B["default"].weight)
    expected = query.weight + 2.0 * query.lora_B["default"].weight @ query.lora_A["default"].weight
    deployed = LoRA(r=2, alpha=4).finish(model, task)
    torch.testing.assert_close(deployed.bert.encoder.layer[1].attention.self.query.weight, expected)


@pytest.mark.parametrize(
    ("field", "value"), [("r", 0), ("alpha", 0.0), ("dropout", 1.0), ("target_modules", ()), ("r", 1.5)]
)
def test_bad_fields_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"LoRA\.{field}"):
        LoRA(**{field: value})


def test_unknown_targets_are_answered_with_the_names_that_exist():
    with pytest.raises(ModelError, match=r"'queri'.*did you mean 'query'.*known: .*dense"):
        LoRA(target_modules=("queri",)).build(TinyTask())
