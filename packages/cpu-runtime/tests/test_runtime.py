from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from models import CONFIGS, quantised_tiny, tiny

from pareto_core.errors import ConfigError, DataError, ModelError, UnsupportedError
from pareto_cpu_runtime.runtime import Runtime

PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [0, 13, 14, 15, 16]])
MASK = (PROMPTS != 0).long()


@pytest.fixture(scope="module")
def pair():
    """A tiny model, and a runtime of it in float64."""
    import reference_native

    patch = pytest.MonkeyPatch()
    for module in ("matrix", "families.build", "runtime"):
        patch.setattr(f"pareto_cpu_runtime.{module}.native", lambda: reference_native)
    model = tiny("llama", seed=3)
    yield model, Runtime.from_pretrained(model, precision=None, max_rows=7, slots=5)
    patch.undo()


def same(pair, ids=PROMPTS, mask=MASK, **options):
    model, runtime = pair
    expected = model.generate(ids, attention_mask=mask, **options)
    got = runtime.generate(ids, attention_mask=mask, **options)
    assert got.dtype == torch.int64
    assert got.tolist() == expected.tolist()
    assert runtime.slots.free == 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 1},
        {"max_new_tokens": 40},
        {"max_length": 12},
        {"max_new_tokens": 30, "eos_token_id": [40, 50, 60, 70, 80, 90, 20, 30], "pad_token_id": 1},
        {"max_new_tokens": 30, "eos_token_id": list(range(3, 60)), "pad_token_id": 1, "min_new_tokens": 6},
        {"max_new_tokens": 30, "eos_token_id": list(range(3, 60)), "min_length": 9},
        {"max_new_tokens": 12, "repetition_penalty": 1.7},
        {"generation_config": tf.GenerationConfig(max_new_tokens=4, pad_token_id=0)},
    ],
)
def test_greedy_equals_transformers(pair, options):
    same(pair, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_beams": 4, "eos_token_id": [40, 50, 60], "max_new_tokens": 25, "early_stopping": True},
        {"num_beams": 4, "eos_token_id": [40, 50, 60], "max_new_tokens": 25, "early_stopping": False},
        {"num_beams": 4, "eos_token_id": [40, 50], "max_new_tokens": 25, "early_stopping": "never"},
        {"num_beams": 3, "eos_token_id": list(range(3, 50)), "length_penalty": 2.0, "num_return_sequences": 3},
        {"num_beams": 3, "eos_token_id": list(range(3, 50)), "length_penalty": -1.0, "pad_token_id": 1},
        {"num_beams": 4, "repetition_penalty": 1.5, "eos_token_id": [5, 7, 30], "min_new_tokens": 5},
        {"num_beams": 5, "max_new_tokens": 1},
    ],
)
def test_beam_search_equals_transformers(pair, options):
    same(pair, **options)


def test_a_prompt_longer_than_a_call_goes_in_parts(pair):
    ids = torch.randint(3, 99, (1, 60))
    same(pair, ids, torch.ones_like(ids), max_new_tokens=10)
    same(pair, ids, torch.ones_like(ids), max_new_tokens=10, num_beams=3)


def test_more_texts_than_slots_wait(pair):
    ids = torch.randint(3, 99, (12, 4))
    same(pair, ids, torch.ones_like(ids), max_new_tokens=5)
    same(pair, ids, torch.ones_like(ids), max_new_tokens=5, num_beams=2)


def test_forward_with_padding_and_loss(pair):
    model, runtime = pair
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [0, 9, 10, 11, 12, 13]])
    mask = (ids != 0).long()
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, labels=labels)
    out = runtime(input_ids=ids, attention_mask=mask, labels=labels)
    kept = mask.bool()
    assert torch.allclose(out.logits[kept], expected.logits[kept], atol=1e-4)
    assert not out.logits[~kept].any()
    assert runtime(input_ids=ids[:, :4]).loss is None


def test_sampling_is_repeatable_and_follows_torchs_seed(pair):
    _, runtime = pair
    options = {"do_sample": True, "max_new_tokens": 20, "temperature": 1.3, "top_k": 30, "top_p": 0.9}
    torch.manual_seed(5)
    first = runtime.generate(PROMPTS, MASK, **options)
    other = runtime.generate(PROMPTS, MASK, **options)
    torch.manual_seed(5)
    assert torch.equal(first, runtime.generate(PROMPTS, MASK, **options))
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(9)
    many = runtime.generate(PROMPTS[1:2], generator=generator, num_return_sequences=4, **options)
    assert many.shape[0] == 4
    assert len({tuple(row) for row in many.tolist()}) == 4


class Words:
    """A tokenizer of one word per token, as much of one as streamers ask for."""

    def decode(self, ids, **_):
        return " ".join(f"w{int(token)}" for token in ids)


def test_streaming_gives_the_text_as_it_comes(pair, capsys):
    _, runtime = pair
    streamer = tf.TextStreamer(Words(), skip_prompt=True)
    out = runtime.generate(PROMPTS[1:2], streamer=streamer, max_new_tokens=6, eos_token_id=None)
    assert capsys.readouterr().out.split() == [f"w{token}" for token in out[0, 5:].tolist()]
    with pytest.raises(ConfigError, match="streamer"):
        runtime.generate(PROMPTS, MASK, streamer=streamer)


def test_stopping_criteria_are_asked_after_every_token(pair):
    _, runtime = pair
    seen = []

    def criterion(ids, scores):
        seen.append(ids.shape[1])
        return torch.tensor([ids.shape[1] >= 9])

    out = runtime.generate(PROMPTS[1:2], stopping_criteria=[criterion], max_new_tokens=30, eos_token_id=None)
    assert out.shape[1] == 9
    assert seen == [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"max_new_tokens": 0}, "no new token"),
        ({"max_length": 5}, "no new token"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"top_p": 0.0, "do_sample": True}, "top_p"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 2, "do_sample": True}, "do_sample"),
        ({"num_beems": 2}, "num_beams"),
        ({"stop_strings": "a"}, "tokenizer"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"num_beams": 6}, "needs 6 slots"),
    ],
)
def test_options_that_cannot_be_are_named(pair, options, message):
    _, runtime = pair
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        runtime.generate(PROMPTS, MASK, **options)
    assert runtime.slots.free == 5


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[5, 99]], None, "token 99 is outside the vocabulary of 99"),
        ([[-1, 5]], None, "token -1"),
        ([[2**40, 5]], None, "outside any vocabulary"),
        ([[1.5, 5]], None, "integers"),
        ([[]], None, "keep one run|at least one token"),
        ([[5, 6, 7]], [[1, 0, 1]], "one run"),
        ([[5, 6, 7]], [[0, 0, 0]], "one run"),
        ([[5, 6, 7]], [[1, 1]], "shape"),
        ([[[5]]], None, "shape"),
        ([[5] * 129], None, "do not fit the cache of 128"),
        ([[5] * 120], None, "do not fit the cache of 128"),
    ],
)
def test_bad_input_is_refused(pair, ids, mask, message):
    _, runtime = pair
    ids = np.array(ids) if np.array(ids).size else np.zeros((1, 0), dtype=np.int64)
    for beams in (1, 2):
        with pytest.raises(DataError, match=message):
            runtime.generate(ids, mask, num_beams=beams, max_new_tokens=20)
    if len(ids[0]) != 120:
        with pytest.raises(DataError, match=message):
            runtime(input_ids=ids, attention_mask=mask)
    assert runtime.slots.free == 5
