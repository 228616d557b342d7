"""Pieces of a global batch: rows, the labels that each loss is over, and models that shift them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pareto_core import TrainingError
from pareto_core.testing import TinyTask
from pareto_runner.shares import loss_of, pieces_of, shares, shifts_labels, terms


def test_ranks_and_accumulation_share_a_batch_without_overlap() -> None:
    batch = {"x": torch.arange(16)}
    pieces = [piece["x"].tolist() for rank in (0, 1) for piece in pieces_of(batch, rank, 2, 2)]
    assert pieces == [[0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7], [12, 13, 14, 15]]


def test_rows_that_do_not_divide_are_all_given_out_once() -> None:
    batch = {"x": torch.arange(11)}
    pieces = [piece["x"].tolist() for rank in (0, 1) for piece in pieces_of(batch, rank, 2, 2)]
    assert sorted(row for piece in pieces for row in piece) == list(range(11))
    assert sorted(map(len, pieces)) == [2, 3, 3, 3]


def test_fewer_rows_than_pieces_are_refused() -> None:
    with pytest.raises(TrainingError, match="3 rows cannot be shared by 2 processes × 2 steps"):
        list(pieces_of({"x": torch.arange(3)}, 0, 2, 2))


def test_terms_by_hand() -> None:
    tokens = torch.tensor([[5, 6, -100], [-100, 7, -100], [-100, -100, -100]])
    assert terms({"labels": tokens}, shifted=False) == 3
    assert terms({"labels": tokens}, shifted=True) == 2
    assert terms({"labels": torch.tensor([1, 0, -100])}, shifted=True) == 2
    assert terms({"labels": torch.tensor([0.5, -100.0])}, shifted=False) == 2
    assert terms({"x": torch.zeros(4, 3)}, shifted=False) == 4


def test_shares_add_up_to_one_over_all_processes() -> None:
    labels = torch.tensor([[1, 1, 1], [1, 1, -100], [1, -100, -100], [-100, -100, -100]])
    found = [share for rank in (0, 1) for _, share in shares({"labels": labels}, rank, 2, 2, shifted=False)]
    assert found == [3 / 6, 1 / 6, 2 / 6, 0.0]


def test_pieces_add_up_to_the_loss_and_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 5, requires_grad=True)
    inputs, labels = torch.randn(6, 3, 4), torch.randint(0, 5, (6, 3))
    labels[1:3, 1:], labels[4:] = -100, -100

    def output(x: torch.Tensor, y: torch.Tensor) -> Any:
        logits = x @ weight
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.reshape(-1, 5), y.reshape(-1)), logits=logits)

    whole = output(inputs, labels).loss
    (expected,) = torch.autograd.grad(whole, weight)
    parts = list(shares({"x": inputs, "labels": labels}, 0, 1, 3, shifted=False))
    total = sum(loss_of(output(piece["x"], piece["labels"]), share) for piece, share in parts)
    assert isinstance(total, torch.Tensor)
    (found,) = torch.autograd.grad(total, weight)
    assert float(total.detach()) == pytest.approx(float(whole.detach()), abs=1e-6)
    assert torch.allclose(found, expected, atol=1e-6)


def test_causal_language_models_shift_their_labels_and_others_do_not() -> None:
    from transformers import (
        BertConfig,
        BertLMHeadModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    def small(config: Any) -> Any:
        return config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    assert shifts_labels(gpt2)
    assert shifts_labels(nn.Sequential(gpt2))
    assert shifts_labels(LlamaForCausalLM(small(LlamaConfig)))
    assert shifts_labels(BertLMHeadModel(small(BertConfig)))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_heads=1, num_layers=1))
    assert not shifts_labels(t5)
    assert not shifts_labels(TinyTask().backbone())
    assert not shifts_labels(nn.Linear(2, 2))
