from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from models import quantised_tiny, tiny

from pareto_core.errors import ConfigError, DataError, ModelError, UnsupportedError
from pareto_cpu_runtime.runtime import Runtime

PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [0, 13, 14, 15, 16]])
MASK = (PROMPTS != 0).long()


@pytest.fixture(scope="module")
def pair():
    """A tiny model, and a runtime of it in fp32."""
    model = tiny("llama", seed=3)
    return model, Runtime.from_pretrained(model, precision=None, max_rows=7, slots=5, threads=2, cache_dtype="fp32")


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
        ([[]], None, r"shape \(1, 0\) hold no token"),
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


def test_no_texts_are_refused(pair):
    _, runtime = pair
    none = torch.zeros(0, 5, dtype=torch.long)
    for beams in (1, 2):
        with pytest.raises(DataError, match=r"shape \(0, 5\) hold no token: give at least one text"):
            runtime.generate(none, num_beams=beams, max_new_tokens=2)
    with pytest.raises(DataError, match=r"shape \(0, 5\) hold no token"):
        runtime(input_ids=none, labels=none)
    assert runtime.slots.free == 5


def test_stop_tokens_outside_the_vocabulary_ban_nothing(pair):
    _, runtime = pair
    options = {"max_new_tokens": 12, "pad_token_id": 0}
    expected = runtime.generate(PROMPTS, MASK, eos_token_id=None, **options)
    # The last token of the vocabulary is one that -1 must not stand for.
    assert (
        runtime.generate(torch.tensor([[98, 98]]), eos_token_id=[-1, 50256], min_new_tokens=3, **options).shape[1] == 14
    )
    for beams in (1, 3):
        plain = runtime.generate(PROMPTS, MASK, eos_token_id=None, num_beams=beams, **options)
        for foreign in (50256, 99, -1):
            got = runtime.generate(PROMPTS, MASK, eos_token_id=foreign, min_new_tokens=12, num_beams=beams, **options)
            assert torch.equal(got, plain if beams > 1 else expected)


@pytest.mark.parametrize("kind", ["mistral", "gptj", "falcon"])
def test_int4_gives_the_tokens_of_the_dequantised_model(kind):
    model, rounded = quantised_tiny(kind)
    runtime = Runtime.from_pretrained(model, compute="fp32", cache_dtype="fp32", threads=2)
    ids = torch.randint(3, 99, (2, 9))
    options = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = rounded.generate(ids, attention_mask=mask, **options)
    assert runtime.generate(ids, **options).tolist() == expected.tolist()


def test_tokens_do_not_depend_on_threads_or_the_size_of_calls():
    model = tiny("llama")
    ids = torch.randint(3, 99, (3, 33))
    outs = []
    for threads, rows in ((1, 512), (2, 5), (3, 64)):
        runtime = Runtime.from_pretrained(model, threads=threads, max_rows=rows, cache_dtype="int8")
        outs.append(runtime(input_ids=ids).logits)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_it_says_what_it_takes_and_which_kernels_run():
    runtime = Runtime.from_pretrained(tiny("llama"), max_length=64, slots=3, cache_dtype="bf16")
    plan = runtime.memory_plan()
    assert plan.weights == runtime.weight_bytes
    assert plan.cache >= 3 * 64 * 2 * 2 * 2 * 16 * 2
    assert plan.total == plan.weights + plan.cache + plan.activations
    rows = runtime.kernels()
    assert set(rows) == {f"{layer}.{part}" for layer in (0, 1) for part in ("qkv", "out", "up", "down")} | {"head"}
    assert rows["0.up"]["shape"] == (192, 64)
    assert rows["0.up"]["bits"] == 4
    assert sum(row["bytes"] for row in rows.values()) < runtime.weight_bytes
    fp32 = Runtime.from_pretrained(tiny("llama"), compute="fp32").kernels()["0.qkv"]["kernel"]
    assert fp32 != rows["0.qkv"]["kernel"] or "vnni" not in rows["0.qkv"]["kernel"]


def test_a_model_larger_than_memory_is_refused_with_both_figures(monkeypatch):
    monkeypatch.setattr("pareto_cpu_runtime.memory.available_bytes", lambda: 1 << 20)
    with pytest.raises(UnsupportedError, match=r"needs \d+ MiB \(weights .* and 1 MiB are available"):
        Runtime.from_pretrained(tiny("llama"), max_length=128, slots=64, max_rows=512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": 4096}, "threads = 4096: must be 1 to 1024"),
        ({"slots": 0}, "slots"),
        ({"max_length": -1}, "max_length"),
        ({"max_length": 0}, "max_length = 0: must be at least 1"),
        ({"cache_dtype": "fp16"}, "cache_dtype"),
        ({"memory": "swap"}, "memory"),
        ({"precision": "int2"}, "precision"),
        ({"kernel": "none"}, "kernel"),
        ({"compute": "int3"}, "compute"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Runtime.from_pretrained(tiny("llama"), **options)


def test_transformers_directories_are_read_and_broken_ones_named(tmp_path):
    model = tiny("llama")
    ids = torch.randint(3, 99, (1, 12))
    expected = Runtime.from_pretrained(model)(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(Runtime.from_pretrained(tmp_path)(input_ids=ids).logits, expected)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        Runtime.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(DataError, match=r"neither model\.safetensors"):
        Runtime.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        Runtime.from_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match="int"):
        Runtime.from_pretrained(3)


def rounded_model(model, **precisions):
    """A ``QuantisedModel`` of every linear module, rounded to nearest."""
    from pareto_cpu_runtime.families import describe
    from pareto_cpu_runtime.quantise.config import Precision
    from pareto_cpu_runtime.quantise.matrix import QuantisedModel
    from pareto_cpu_runtime.quantise.rtn import round_to_nearest

    modules = describe(model.config).modules()
    matrices = {}
    for name in modules:
        choice = next((value for part, value in precisions.items() if part in name), Precision(group_size=32))
        if choice is not None:
            matrices[name] = round_to_nearest(model.get_submodule(name).weight.detach(), choice, name)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in matrices}
    return QuantisedModel(model.config, type(model).__name__, matrices, kept, (), {})


@pytest.mark.parametrize("kind", ["llama", "llama-odd", "gpt_neox", "falcon-new", "phi3"])
@pytest.mark.parametrize("memory", ["read", "map"])
@pytest.mark.parametrize("fused", [True, False])
def test_packed_directories_compute_what_the_model_does(tmp_path, kind, memory, fused):
    from pareto_cpu_runtime.checkpoint import save_packed
    from pareto_cpu_runtime.families import fusions

    model = tiny(kind)
    quantised = rounded_model(model) if kind != "llama-odd" else rounded_model(model, down_proj=None)
    ids = torch.randint(3, 99, (1, 15))
    expected = Runtime.from_pretrained(quantised)(input_ids=ids).logits
    save_packed(quantised, tmp_path, fusions(model.config) if fused else ())
    assert torch.equal(Runtime.from_pretrained(tmp_path, memory=memory)(input_ids=ids).logits, expected)


def test_reading_a_packed_model_takes_its_size_once(tmp_path):
    from pareto_cpu_runtime.memory import Arena, move

    path = tmp_path / "bytes"
    content = np.random.default_rng(0).integers(0, 256, 40 << 20, dtype=np.uint8)
    content.tofile(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="c")
    odd = mapped[77 : len(mapped) - 5]
    target = Arena().take(len(odd))
    before = file_pages()
    move(odd, target)
    assert np.array_equal(target, content[77:-5])
    assert file_pages() - before < 1 << 20
    assert np.array_equal(mapped, content)


def file_pages():
    """Bytes of mapped files that this process holds in memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile"))


def test_a_damaged_packed_directory_is_named(tmp_path):
    from pareto_cpu_runtime.checkpoint import save_packed

    save_packed(rounded_model(tiny("llama")), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="truncated"):
        Runtime.from_pretrained(tmp_path)
    weights.write_bytes(whole[:-9] + bytes(9))
    with pytest.raises(DataError, match="sha256"):
        Runtime.from_pretrained(tmp_path)


def test_mixed_precision_within_an_operator_is_exact():
    from pareto_cpu_runtime.quantise.config import Precision

    mixed = rounded_model(
        tiny("llama"),
        k_proj=Precision(bits=8, group_size=32, symmetric=False),
        v_proj=Precision(bits=3, group_size="channel"),
        gate_proj=None,
        down_proj=None,
    )
    ids = torch.randint(3, 99, (1, 15))
    runtime = Runtime.from_pretrained(mixed, compute="fp32", cache_dtype="fp32")
    with torch.no_grad():
        expected = mixed.dequantise()(input_ids=ids).logits
    out = runtime(input_ids=ids).logits
    assert float((out - expected).abs().max() / expected.abs().max()) < 1e-4
    rows = runtime.kernels()
    assert (rows["0.qkv"]["bits"], rows["0.qkv"]["group"], rows["0.qkv"]["asymmetric"]) == (8, 32, True)
    assert rows["0.up"]["bits"] == 32


def test_importing_the_package_does_not_import_torch():
    code = "import sys, pareto_cpu_runtime; pareto_cpu_runtime.Runtime; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
