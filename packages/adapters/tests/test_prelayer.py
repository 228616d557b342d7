from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pareto_adapters import PrefixTuning, PreLayer
from pareto_core import ModelError
from pareto_core.tiny import TinyTask
from pareto_core.weights import parameter_counts

ARCHITECTURES = ["gpt2", "llama"]


def batch_of(task):
    return next(task.batches("test", 4, 0))


def longer_logits(plain, trained, batch, positions):
    """Run the longer sequence, and overwrite what each layer reads at the first positions."""

    def overwrite(index, module, inputs):
        hidden = trained[:, index].expand(len(inputs[0]), -1, -1)
        return (torch.cat([hidden, inputs[0][:, positions:]], 1), *inputs[1:])

    layers = plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers
    hooks = [layer.register_forward_pre_hook(partial(overwrite, index)) for index, layer in enumerate(layers)]
    filler = torch.zeros(len(batch["input_ids"]), positions, dtype=torch.long)
    longer = torch.cat([filler, batch["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(filler), batch["attention_mask"]], 1)
    logits = plain(input_ids=longer, attention_mask=mask).logits[:, positions:]
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_longer_sequence_with_its_activations_overwritten(architecture):
    task = TinyTask(architecture=architecture)
    plain, batch = task.frozen_backbone().eval(), batch_of(task)
    batch["attention_mask"][0, 9:] = 0
    model = PreLayer(positions=5).build(task).eval()
    trained = model.prompt_encoder["default"].embedding.weight
    torch.nn.init.normal_(trained)
    expected = longer_logits(plain, trained.view(5, 2, -1), batch, 5)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], expected[real])
    (found,) = torch.autograd.grad(model(**batch).logits[real].square().sum(), trained)
    (slow,) = torch.autograd.grad(expected[real].square().sum(), trained)
    torch.testing.assert_close(found, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_the_start_it_is_the_model_that_reads_the_words_in_front(architecture):
    task = TinyTask(architecture=architecture)
    plain, batch = task.backbone().eval(), batch_of(task)
    torch.manual_seed(3)
    model = PreLayer(positions=4).build(task).eval()
    torch.manual_seed(3)
    words = torch.randint(0, plain.config.vocab_size, (1, 4))
    longer = torch.cat([words.expand(4, -1), batch["input_ids"]], 1)
    torch.testing.assert_close(model(**batch).logits, plain(input_ids=longer).logits[:, 4:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_deployed_is_prefix_tuning_with_the_keys_and_values_stored(architecture, tmp_path):
    task, method = TinyTask(architecture=architecture), PreLayer(positions=4)
    model = method.build(task).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    batch = batch_of(task)
    logits = model(**batch).logits
    prompts = {key: value[:, :8] for key, value in batch.items() if key != "labels"}
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    tokens = model.generate(**prompts, **settings)
    deployed = method.finish(model, task)
    assert type(deployed.prompt_encoder["default"]) is peft.PrefixEncoder
    torch.testing.assert_close(deployed(**batch).logits, logits)
    assert torch.equal(deployed.generate(**prompts, **settings), tokens)
    method.save(deployed, tmp_path)
    loaded = PrefixTuning().load(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, logits)


def test_parameters_are_those_of_table_5_1(monkeypatch):
    monkeypatch.setattr("pareto_adapters._build.check_finite", lambda model: None)

    class Medium(TinyTask):
        def backbone(self):
            return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))

    with torch.device("meta"):
        trainable, _ = parameter_counts(PreLayer().build(Medium(architecture="gpt2")))
    assert trainable == 24 * 1024 * 15 == 368_640
    assert round(trainable / 2**20, 2) == 0.35


def test_layer_norms_reach_the_prefix_too():
    task = TinyTask(architecture="gpt2")
    model = PreLayer(positions=3, train_layer_norms=True).build(task)
    encoder = model.prompt_encoder["default"]
    encoder(torch.arange(3).expand(2, 3)).square().sum().backward()
    assert model.get_base_model().transformer.h[1].ln_1.weight.grad.abs().sum() > 0


def test_trains_in_bf16():
    task = TinyTask(architecture="llama")
    model = PreLayer(positions=3).build(task, task.frozen_backbone().bfloat16())
    model(**batch_of(task)).loss.backward()
    gradient = model.prompt_encoder["default"].embedding.weight.grad
    assert gradient.dtype == torch.float32
    assert float(gradient.abs().sum()) > 0


def test_architectures_that_it_does_not_know_are_refused():
    task = TinyTask(architecture="gpt2")
    model = task.frozen_backbone()
    model.config.model_type = "gptx"
    with pytest.raises(
        ModelError, match=r"PreLayer knows how gpt2, llama, .* make keys and values, but not how gptx does"
    ):
        PreLayer().build(task, model)
