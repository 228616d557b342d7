from __future__ import annotations

import pytest
import torch
import transformers as tf


def tiny_model(kind: str) -> torch.nn.Module:
    """A random model of a few thousand weights; ``in`` differs from ``out`` where the architecture allows it."""
    torch.manual_seed(0)
    if kind == "t5":
        config = tf.T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=6,
            num_heads=2,
            d_ff=24,
            num_layers=1,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        return tf.T5ForConditionalGeneration(config)
    if kind == "gpt2":
        config = tf.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        return tf.GPT2LMHeadModel(config)
    if kind == "llama":
        config = tf.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
        return tf.LlamaForCausalLM(config)
    if kind == "vit":
        config = tf.ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
        )
        return tf.ViTForImageClassification(config)
    config = tf.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return tf.BertForSequenceClassification(config)


def tiny_batch(kind: str) -> dict[str, torch.Tensor]:
    if kind == "vit":
        pixels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 1])}
    ids = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    if kind == "bert":
        return {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 1])}
    return {"input_ids": ids, "labels": ids[:, :5].contiguous() if kind == "t5" else ids}


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def make_batch():
    return tiny_batch


@pytest.fixture
def t5_base():
    """T5-base's 222,903,552 parameters, without their values."""
    config = tf.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        return tf.T5ForConditionalGeneration(config).requires_grad_(False)
