from __future__ import annotations

import peft
import pytest
import torch
from transformers import BertForSequenceClassification

from pareto_adapters import LoRA, PrefixTuning
from pareto_core import ConfigError, ModelError
from pareto_core.tiny import TinyTask
from pareto_core.weights import load_transformer, parameter_counts


class RoomyBert(TinyTask):
    """The tiny BERT with positions to spare for a prefix."""

    def backbone(self):
        config = super().backbone().config
        config.max_position_embeddings = 40
        torch.manual_seed(0)
        return BertForSequenceClassification(config)


def trained_somewhat(model):
    """Move what is trained away from where it starts."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch_of(task):
    return next(task.batches("test", 4, 0))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_at_the_start_it_is_the_model_that_reads_the_words_in_front(architecture):
    task = TinyTask(architecture=architecture)
    plain = task.backbone().eval()
    batch = batch_of(task)
    torch.manual_seed(3)
    model = PrefixTuning(positions=4).build(task).eval()
    torch.manual_seed(3)
    words = torch.randint(0, plain.config.vocab_size, (1, 4))
    longer = torch.cat([words.expand(4, -1), batch["input_ids"]], 1)
    torch.testing.assert_close(model(**batch).logits, plain(input_ids=longer).logits[:, 4:])


def test_what_is_trained_is_two_numbers_for_each_layer_position_and_width():
    task = TinyTask(architecture="gpt2", hidden=32)
    model = PrefixTuning(positions=5).build(task)
    assert parameter_counts(model)[0] == 2 * 2 * 5 * 32
    grouped = TinyTask(architecture="llama", hidden=32)  # one head of keys and values for two of queries
    assert parameter_counts(PrefixTuning(positions=5).build(grouped))[0] == 2 * 2 * 5 * 16


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generation_follows_the_logits_also_where_a_batch_is_padded(architecture):
    task = TinyTask(architecture=architecture)
    method = PrefixTuning(positions=4)
    model = method.finish(trained_somewhat(method.build(task)), task)
    ids = batch_of(task)["input_ids"][:2, :6]
    tokens = ids
    for _ in range(3):
        tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "eos_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings), tokens)
    padded = torch.cat([torch.full((2, 2), 5), ids], 1)
    mask = torch.cat([torch.zeros(2, 2, dtype=torch.long), torch.ones_like(ids)], 1)
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **settings)[:, 2:], tokens)
    beams = model.generate(input_ids=padded, attention_mask=mask, num_beams=2, **settings)
    assert beams.shape == (2, 11)


def test_an_encoder_is_tuned_with_its_head_in_place(tmp_path):
    task, method = RoomyBert(), PrefixTuning(positions=4)
    model = method.build(task)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {
        "base_model.classifier.weight",
        "base_model.classifier.bias",
        "prompt_encoder.default.embedding.weight",
    }
    batch = batch_of(task)
    deployed = method.finish(trained_somewhat(model), task)
    logits = deployed(**batch).logits
    padded = {key: torch.nn.functional.pad(batch[key], (0, 3)) for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(deployed(**padded).logits, logits)
    assert not torch.allclose(logits, deployed.get_base_model()(**batch).logits, atol=1e-3)
    method.save(deployed, tmp_path)
    torch.testing.assert_close(method.load(tmp_path)(**batch).logits, logits)


def test_peft_reads_what_is_saved(tmp_path):
    task, method = TinyTask(architecture="gpt2"), PrefixTuning()
    deployed = method.finish(trained_somewhat(method.build(task)), task)
    method.save(deployed, tmp_path)
    loaded = peft.PeftModel.from_pretrained(load_transformer(tmp_path), str(tmp_path / "prefix")).eval()
    batch = batch_of(task)
    torch.testing.assert_close(loaded(**batch).logits, deployed(**batch).logits)


def test_weights_in_bf16_stay_in_bf16(tmp_path):
    task, method = TinyTask(architecture="gpt2"), PrefixTuning()
    model = method.build(task, task.frozen_backbone().bfloat16()).to(torch.bfloat16)
    method.save(method.finish(model, task), tmp_path)
    loaded = method.load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(**batch_of(task)).logits, model(**batch_of(task)).logits)


def test_a_prefix_that_leaves_no_room_is_refused():
    task = TinyTask(architecture="gpt2")  # 48 positions, texts of 12 tokens
    PrefixTuning(positions=36).build(task)
    with pytest.raises(
        ModelError, match="37 positions in front of texts of up to 12 tokens, but GPT2LMHeadModel has 48"
    ):
        PrefixTuning(positions=37).build(task)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match=r"PrefixTuning\.positions"):
        PrefixTuning(positions=0)
    task = TinyTask(architecture="gpt2")
    with pytest.raises(ModelError, match="GPT2LMHeadModel holds no prefix: finish takes what build returned"):
        PrefixTuning().finish(task.backbone(), task)


def test_the_reason_to_refuse_encoder_decoders_still_holds():
    """PEFT hands layer 0's part of the prefix to layer L/2 too; when it no longer does, T5 can be supported."""
    task = TinyTask(architecture="t5")
    model = peft.get_peft_model(
        task.backbone(), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    )
    model(**batch_of(task)).loss.backward()
    per_layer = model.prompt_encoder["default"].embedding.weight.grad.abs().sum(0).view(2, -1).sum(1)
    assert per_layer[0] > 0
    assert per_layer[1] == 0


def test_models_with_adapters_or_without_a_cache_are_refused():
    task = TinyTask(architecture="llama")
    with pytest.raises(ModelError, match="holds adapters already"):
        PrefixTuning().build(task, LoRA().build(task))
    with pytest.raises(ModelError, match="holds adapters already"):
        LoRA().build(task, PrefixTuning().build(task))
    model = task.frozen_backbone()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        PrefixTuning().build(task, model)
