from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from pareto_adapters import FTProjections, FTTop, FullFineTuning, LoRA
from pareto_adapters.partial import FullDeltaCell, FullDeltaConfig, FullDeltaLayer, transformer_layers
from pareto_core import ConfigError, ModelError
from pareto_core.testing import check_method
from pareto_core.tiny import TinyTask
from pareto_core.weights import parameter_counts

ARCHITECTURES = ["bert", "t5", "gpt2", "llama", "vit"]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def gpt2_medium() -> nn.Module:
    with torch.device("meta"):
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    return model.requires_grad_(False)


def test_trainable_parameters_of_gpt2_medium_are_those_of_table_5_1():
    config = FullDeltaConfig(target_modules=["c_attn"], fused_parts=["q", "v"])
    assert parameter_counts(get_peft_model(gpt2_medium(), config))[0] == 50_331_648 == 48 * 2**20
    top = transformer_layers(gpt2_medium())[-2:]
    assert sum(parameter.numel() for layer in top for parameter in layer.parameters()) == 25_192_448
    assert parameter_counts(gpt2_medium())[1] == 354_823_168


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [FTProjections(), FTTop(), FTTop(layers=1)])
def test_conforms(architecture, method):
    check_method(method, TinyTask(architecture=architecture))


def test_separate_projections_are_unfrozen_without_their_biases():
    task = TinyTask()
    model = FTProjections().build(task)
    inside = "bert.encoder.layer.{}.attention.self.{}.weight"
    expected = {inside.format(layer, name) for layer in (0, 1) for name in ("query", "value")}
    assert trainable(model) == expected | {"classifier.weight", "classifier.bias"}
    assert FTProjections().finish(model, task) is model


@pytest.mark.parametrize("names", [("q", "v"), ("k",)])
def test_a_difference_beside_a_part_trains_as_the_part_does(names):
    """Against a GPT-2 whose fused weight is trained with the gradients of the other parts set to zero."""
    task = TinyTask(architecture="gpt2")
    ours, reference = FTProjections(target_modules=names).build(task), task.frozen_backbone()
    assert all("fulldelta_cell" in name for name in trainable(ours))
    weights = [block.attn.c_attn.weight.requires_grad_(True) for block in reference.transformer.h]
    mine = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    theirs = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    for batch in task.batches("train", 16, seed=0):
        for model in (ours, reference):
            model(**batch).loss.backward()
        for weight in weights:
            for part, gradient in zip("qkv", weight.grad.chunk(3, 1), strict=True):
                if part not in names:
                    gradient.zero_()
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    deployed = FTProjections().finish(ours, task)
    assert type(deployed) is type(reference)
    assert set(deployed.state_dict()) == set(reference.state_dict())
    start = task.backbone()
    for new, old, first in zip(deployed.transformer.h, reference.transformer.h, start.transformer.h, strict=True):
        torch.testing.assert_close(new.attn.c_attn.weight, old.attn.c_attn.weight, atol=1e-5, rtol=0)
        moved = (new.attn.c_attn.weight - first.attn.c_attn.weight).abs().chunk(3, 1)
        assert [bool(change.max() > 1e-4) for change in moved] == [part in names for part in "qkv"]


def test_the_difference_is_added_as_it_is():
    torch.manual_seed(0)
    cell = FullDeltaCell(FullDeltaConfig(), in_features=5, out_features=3)
    x, y = torch.randn(4, 5), torch.randn(4, 3)
    assert torch.equal(cell(x, y), y)
    nn.init.normal_(cell.D)
    torch.testing.assert_close(cell(x, y), y + x @ cell.delta().T)


def test_a_stage_with_lora_leaves_the_merging_to_lora():
    task = TinyTask()
    model = FTProjections(target_modules=("k",)).build(task)
    model = LoRA().build(task, model)
    deployed = LoRA().finish(FTProjections().finish(model, task), task)
    assert set(deployed.state_dict()) == set(task.backbone().state_dict())


def test_a_model_with_adapters_is_refused():
    task = TinyTask(architecture="gpt2")
    model = FTProjections().build(task)
    assert any(isinstance(module, FullDeltaLayer) for module in model.modules())
    with pytest.raises(ModelError, match="holds adapters already"):
        FTProjections().build(task, model)


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [
        ("bert", "bert.encoder.layer.{}."),
        ("t5", "decoder.block.{}."),
        ("gpt2", "transformer.h.{}."),
        ("llama", "model.layers.{}."),
        ("vit", "vit.layers.{}."),
    ],
)
def test_the_last_layers_of_every_architecture(architecture, prefix):
    task = TinyTask(architecture=architecture)
    every = {name for name, _ in task.backbone().named_parameters()}
    for layers, wanted in ((1, ("1",)), (2, ("0", "1"))):
        expected = {name for name in every if name.startswith(tuple(prefix.format(number) for number in wanted))}
        head = {name for name in every if name.startswith("classifier.")}
        assert expected
        assert trainable(FTTop(layers=layers).build(task)) == expected | head


def test_one_layer_of_three_lists_is_still_the_layer(make_model):
    """A T5 block holds a list of three sublayers, which is longer than the list of its one block."""
    (block,) = transformer_layers(make_model("t5"))
    assert type(block).__name__ == "T5Block"


def test_more_layers_than_there_are_and_models_without_any_are_refused():
    with pytest.raises(ModelError, match="layers = 3, but BertForSequenceClassification has 2"):
        FTTop(layers=3).build(TinyTask())
    with pytest.raises(ModelError, match="Sequential has no list of layers"):
        transformer_layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"FTTop\.layers = 0: must be above 0"):
        FTTop(layers=0)
    with pytest.raises(ConfigError, match=r"FTProjections\.target_modules = \(\): name at least one"):
        FTProjections(target_modules=())


def test_weights_that_are_not_numbers_are_refused():
    task = TinyTask()
    start = task.backbone()
    start.classifier.bias.data[0] = float("nan")
    for method in (FTProjections(), FTTop(), FullFineTuning()):
        with pytest.raises(ModelError, match=r"classifier\.bias holds NaN"):
            method.build(task, start)
