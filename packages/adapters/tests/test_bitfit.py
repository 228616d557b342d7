from __future__ import annotations

import re

import pytest
import torch

from pareto_adapters import BitFit, Houlsby, LoRA, RLoDA
from pareto_adapters.r_loda import LowRank
from pareto_core import ModelError, TaskSpec
from pareto_core.testing import TinyTask
from pareto_core.weights import freeze, load_transformer, save_transformer


class Headless(TinyTask):
    """A task whose model has no head."""

    @property
    def spec(self):
        return TaskSpec()


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_trains_the_biases_and_the_head():
    model = BitFit().build(TinyTask())
    names = trainable(model)
    assert "classifier.weight" in names
    assert {name for name in names if not name.endswith(".bias")} == {"classifier.weight"}
    assert {name for name, _ in model.named_parameters() if name.endswith(".bias")} <= names
    assert set(model.state_dict()) == set(TinyTask().backbone().state_dict())


def test_layer_norms_on_request():
    more = trainable(BitFit(train_layer_norms=True).build(TinyTask())) - trainable(BitFit().build(TinyTask()))
    assert more
    assert all(name.endswith("LayerNorm.weight") for name in more)


def test_gives_t5_biases_of_zero_and_leaves_relative_attention_bias_alone(make_model, make_batch, tmp_path):
    start = freeze(make_model("t5").eval())
    batch = make_batch("t5")
    before = start(**batch).logits
    model = BitFit().build(Headless(), start)
    torch.testing.assert_close(model(**batch).logits, before)
    names = trainable(model)
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert names == {f"{name}.bias" for name in linear}
    assert not any("relative_attention_bias" in name for name in names)
    for name, parameter in model.named_parameters():
        if name in names:
            torch.nn.init.normal_(parameter)
    save_transformer(BitFit().finish(model, Headless()), tmp_path)
    torch.testing.assert_close(load_transformer(tmp_path)(**batch).logits, model(**batch).logits)


def test_a_model_with_some_biases_gets_no_more(make_model):
    start = freeze(make_model("gpt2"))
    before = {name for name, _ in start.named_parameters()}
    model = BitFit().build(Headless(), start)
    assert {name for name, _ in model.named_parameters()} == before
    assert trainable(model) == {name for name in before if name.endswith(".bias")}


def test_weights_that_are_not_numbers_are_refused(make_model):
    start = make_model("bert")
    start.bert.pooler.dense.bias.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"bert\.pooler\.dense\.bias holds NaN"):
        BitFit().build(TinyTask(), start)


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
@pytest.mark.parametrize("adapter", [LoRA(), Houlsby()], ids=["lora", "houlsby"])
def test_trained_together_with_an_adapter(architecture, adapter):
    task = TinyTask(architecture=architecture)
    alone, adapted = BitFit().build(task), adapter.build(task)
    before = {name for name, _ in adapted.named_parameters()}
    model = BitFit().build(task, adapted)
    biases = {name for name in trainable(model) if name.endswith(".bias") and not re.search("lora_|houlsby_", name)}
    assert len(biases) == len({name for name in trainable(alone) if name.endswith(".bias")})
    assert not any(re.search("lora_|houlsby_", name) for name in {n for n, _ in model.named_parameters()} - before)
    assert {name for name in before if re.search("lora_|houlsby_", name)} <= trainable(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    batch = next(iter(task.batches("test", 4, 0)))
    expected = model.eval()(**batch).logits
    deployed = BitFit().finish(adapter.finish(model, task), task)
    torch.testing.assert_close(deployed(**batch).logits, expected, atol=1e-5, rtol=0)
    if isinstance(adapter, LoRA):
        assert set(deployed.state_dict()) == set(alone.state_dict())


def test_factors_in_place_of_bias_free_projections_get_biases_too():
    task = TinyTask(architecture="llama", hidden=96)
    model = BitFit().build(task, RLoDA(rank=24).build(task))
    layers = [m for m in model.modules() if isinstance(m, LowRank)]
    assert len(layers) == 6
    assert all(layer.bias.requires_grad and layer.bias.shape == (layer.out_features,) for layer in layers)


def test_the_biases_that_t5_gets_are_those_of_table_4_5(t5_base, monkeypatch):
    monkeypatch.setattr("pareto_adapters.bitfit.check_finite", lambda model: None)  # there are no values
    norms = 47_616
    for layer_norms, percent in ((False, 0.1054), (True, 0.1267)):
        model = BitFit(train_layer_norms=layer_norms).build(TinyTask(architecture="t5"), t5_base)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == 234_880 + norms * layer_norms
        assert round(100 * trained / 222_903_552, 4) == percent  # 0.12 in print
