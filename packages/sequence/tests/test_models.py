import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from pareto_core.errors import ConfigError, DataError, ModelError, UnsupportedError
from pareto_sequence.blocks import DenseAttention
from pareto_sequence.configuration import MIXERS, SequenceConfig
from pareto_sequence.matching import parameter_count, parameter_matched
from pareto_sequence.modeling import (
    SequenceForCausalLM,
    SequenceForSequenceClassification,
    load_model,
    pool,
)

LABELS = 3


def config(**changes: Any) -> SequenceConfig:
    small = {
        "vocab_size": 17,
        "hidden_size": 16,
        "value_size": 12,
        "ffn_size": 20,
        "shared_size": 6,
        "num_layers": 2,
        "chunk_size": 5,
        "num_heads": 2,
        "state_size": 3,
        "kernel_size": 3,
        "dilation_factor": 2,
        "tcn_depth": 2,
        "num_labels": LABELS,
    }
    return SequenceConfig(**(small | changes))


def language_model(**changes: Any) -> SequenceForCausalLM:
    torch.manual_seed(0)
    return SequenceForCausalLM(config(**changes)).eval()


def classifier(**changes: Any) -> SequenceForSequenceClassification:
    torch.manual_seed(0)
    return SequenceForSequenceClassification(config(causal=False, **changes)).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(1))


OPTIONS = [
    {"bias": "rotary"},
    {"bias": "simple", "norm": "scale", "prenorm": False},
    {"bias": "none", "norm": "rms", "chunk_size": None, "positions": "sinusoidal", "tcn_norm": "rms"},
    {"bias": "simple", "chunk_size": None, "max_position_embeddings": 32, "tcn_omega": True},
]


@pytest.mark.parametrize(("mixer", "options"), itertools.product(MIXERS, OPTIONS))
@pytest.mark.parametrize("length", [1, 4, 13])
def test_shapes_of_both_heads(mixer: str, options: dict[str, Any], length: int) -> None:
    ids = tokens(2, length)
    assert language_model(mixer=mixer, **options)(ids).logits.shape == (2, length, 17)
    assert classifier(mixer=mixer, **options)(ids).logits.shape == (2, LABELS)


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "transformer"])
def test_laplace_attention_and_batch_norm(mixer: str) -> None:
    options = {"mixer": mixer, "attention": "laplace", "norm": "batch", "tcn_norm": "batch"}
    model = classifier(**options).train()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:] = 0
    loss = model(tokens(3, 9), mask, torch.tensor([0, 1, 2])).loss
    assert loss.isfinite()
    assert language_model(mixer=mixer, attention="laplace")(tokens(2, 9)).logits.isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_decoder_sees_nothing_later(mixer: str) -> None:
    model, ids = language_model(mixer=mixer).double(), tokens(1, 13)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 17
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=1e-7)
    assert (before[:, 8] - after[:, 8]).abs().max() > 1e-5


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "transformer"])
def test_an_encoder_sees_both_ways(mixer: str) -> None:
    model, ids = classifier(mixer=mixer).model.double(), tokens(1, 13)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 17
    moved = (model(ids).last_hidden_state - model(changed).last_hidden_state).abs().amax(-1)[0]
    assert (moved[5:8] > 1e-6).all()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("options", [*OPTIONS, {"norm": "batch", "tcn_norm": "batch", "prenorm": False}])
def test_padding_does_not_change_valid_outputs(mixer: str, options: dict[str, Any]) -> None:
    lengths, ids = [13, 7, 2], tokens(3, 13)
    mask = (torch.arange(13)[None] < torch.tensor(lengths)[:, None]).long()
    encoder, decoder = classifier(mixer=mixer, **options), None
    if "batch" not in options.values():
        decoder = language_model(mixer=mixer, **options)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, :length]
        torch.testing.assert_close(encoder(ids, mask).logits[row], encoder(alone).logits[0], rtol=1e-4, atol=1e-5)
        if decoder is not None:
            logits = decoder(ids, mask).logits[row, :length]
            torch.testing.assert_close(logits, decoder(alone).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_reach_every_parameter(mixer: str, causal: bool) -> None:
    if causal:
        model: Any = language_model(mixer=mixer, tcn_omega=True).train()
        ids = tokens(2, 13)
        model(ids, labels=ids).loss.backward()
    else:
        model = classifier(mixer=mixer, tcn_omega=True, bias="simple", chunk_size=13).train()
        model(tokens(2, 13), labels=torch.tensor([0, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_language_models_loss_by_hand() -> None:
    model, ids = language_model(), tokens(2, 6)
    labels = ids.clone()
    labels[0, :3], labels[1, 5] = -100, -100
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    terms = []
    for row, t in itertools.product(range(2), range(5)):
        target = int(labels[row, t + 1])
        if target != -100:
            logits = output.logits[row, t].double()
            terms.append(logits.exp().sum().log() - logits[target])
    assert len(terms) == 7
    assert float(output.loss.detach()) == pytest.approx(float(torch.stack(terms).mean().detach()), abs=1e-5)


def test_the_classifiers_loss_and_pairs_by_hand() -> None:
    model = classifier(inputs="pairs")
    first, second, labels = tokens(2, 6), tokens(2, 9) // 2, torch.tensor([2, 0])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": first, "attention_mask": torch.ones_like(first), "labels": labels}
    output = model(**batch, input_ids_2=second, attention_mask_2=mask)
    a = model.model(first).last_hidden_state.mean(1)
    encoded = model.model(second, mask).last_hidden_state
    b = torch.stack([encoded[0].mean(0), encoded[1, :5].mean(0)])
    joined = torch.cat([a, b, a * b, a - b], 1)
    logits = model.classifier(F.silu(model.hidden(joined)))
    torch.testing.assert_close(output.logits, logits)
    expected = -(logits.softmax(-1)[torch.arange(2), labels].log().mean())
    torch.testing.assert_close(output.loss, expected)


def test_a_classifier_of_values_reads_each_number_by_one_linear_map() -> None:
    model = classifier(inputs="values", pooling="last")
    values = torch.rand(2, 10)
    output = model(input_values=values, attention_mask=torch.ones(2, 10), labels=torch.tensor([1, 0]))
    assert output.loss.isfinite()
    assert output.logits.shape == (2, LABELS)
    assert model.model.embedding.weight.shape == (16, 1)
    with pytest.raises(ModelError, match="takes input_values"):
        model(input_ids=tokens(2, 10))


def test_pooling_by_hand() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(x, mask, "mean").tolist() == [[1.0, 2.0], [8.0, 9.0]]
    assert pool(x, mask, "last").tolist() == [[2.0, 3.0], [10.0, 11.0]]


def test_pooling_reads_nothing_of_what_the_mask_hides() -> None:
    x = torch.tensor([[[1.0], [3.0], [float("nan")]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(x, mask, "mean").tolist() == [[2.0]]
    assert pool(x, mask, "last").tolist() == [[3.0]]


@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention_reads_nothing_of_what_the_mask_hides(causal: bool) -> None:
    torch.manual_seed(0)
    attention = DenseAttention(8, 2, causal=causal, rotary=True)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = attention(x[:1, :3])
    x[0, 3], x[0, 4] = float("inf"), float("nan")
    torch.testing.assert_close(attention(x, mask)[:1, :3], expected)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), 1e30])
def test_nothing_that_is_padded_comes_through(mixer: str, causal: bool, pooling: str, hidden: float) -> None:
    torch.manual_seed(0)
    changes = {"mixer": mixer, "causal": causal, "pooling": pooling, "inputs": "values"}
    reader = SequenceForSequenceClassification(config(**changes)).eval()
    values, mask = torch.rand(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    expected = reader(input_values=values[:1, :5]).logits
    values[0, 5:] = hidden
    output = reader(input_values=values, attention_mask=mask, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(output.logits[:1], expected, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in reader.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_returns_the_same(mixer: str, tied: bool, tmp_path: Path) -> None:
    model, ids = language_model(mixer=mixer, tie_word_embeddings=tied), tokens(2, 11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path, save_original_format=False)
    loaded = load_model(tmp_path)
    assert type(loaded) is SequenceForCausalLM
    assert not loaded.training
    assert loaded.config.mixer == mixer
    assert loaded.config.chunk_size == 5
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert (loaded.lm_head.weight is loaded.model.embedding.weight) == tied


def test_a_saved_classifier_keeps_its_running_figures(tmp_path: Path) -> None:
    model = classifier(norm="batch", mixer="mega", attention="laplace")
    model.train()(tokens(4, 9), labels=torch.tensor([0, 1, 2, 0]))
    model.eval().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded(tokens(2, 7)).logits, model(tokens(2, 7)).logits, rtol=0, atol=0)
    with pytest.raises(DataError, match=r"no config\.json"):
        load_model(tmp_path / "nothing")


def changed(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    name = "model.layers.0.temporal.mixer.blocks.0.weight"
    if change == "missing":
        return {key: value for key, value in tensors.items() if key != name}
    return tensors | ({name: torch.zeros(16, 9)} if change == "mismatched" else {"model.extra": torch.zeros(3)})


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_that_are_not_the_models_are_refused(change: str, tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(changed(load_file(path), change), path, metadata={"format": "pt"})
    key = "model.extra" if change == "unexpected" else r"model\.layers\.0\.temporal\.mixer\.blocks\.0\.weight"
    with pytest.raises(DataError, match=key):
        load_model(tmp_path)


def test_files_that_cannot_be_read_are_data_errors(tmp_path: Path) -> None:
    model = language_model()
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path)).lm_head.weight, model.lm_head.weight)
    (tmp_path / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(DataError, match="the saved model cannot be read"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match="the saved model cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="the saved model cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="the saved model cannot be read"):
        load_model(tmp_path)


def test_initialisation_is_megas() -> None:
    model = language_model(mixer="mega", hidden_size=128, value_size=256, vocab_size=500)
    layer = model.model.layers[0]
    assert float(layer.temporal.value.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(layer.feed_forward.inner.down.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.model.embedding.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.05)
    assert not layer.temporal.value.bias.any()
    beta = layer.temporal.mixer.beta.detach().mean(0)
    assert float(beta[0]) == pytest.approx(1, abs=0.02)
    assert float(beta[1]) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_is_close_to_single_precision(mixer: str) -> None:
    model, ids = language_model(mixer=mixer), tokens(2, 13)
    expected = model(ids).logits
    logits = model.bfloat16()(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpointing_gives_the_same_gradients(mixer: str) -> None:
    ids = tokens(2, 9)
    gradients = []
    for checkpointing in (False, True):
        model = language_model(mixer=mixer).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_hidden_states_and_tuples() -> None:
    model, ids = language_model(), tokens(1, 7)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    (logits,) = model(ids, return_dict=False)
    torch.testing.assert_close(logits, output.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])


@pytest.mark.parametrize("mixer", ["mega", "tcnca"])
def test_enwik8s_models_have_39_million_parameters(mixer: str) -> None:
    # 205 different bytes occur in EnWik8; a vocabulary of all 256 stays within the same one per cent.
    for vocabulary in (205, 256):
        assert abs(parameter_count(SequenceConfig(mixer=mixer, vocab_size=vocabulary)) / 39e6 - 1) < 0.01


def test_parameter_count_is_that_of_the_model() -> None:
    for tied in (True, False):
        model = language_model(tie_word_embeddings=tied, num_layers=3)
        assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
    model = classifier(inputs="pairs", mixer="tcn")
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_matched_configurations_have_as_many_parameters(mixer: str) -> None:
    original = SequenceConfig(vocab_size=205)
    matched = parameter_matched(original, mixer)
    assert matched.mixer == mixer
    assert matched.ffn_size == original.ffn_size
    assert abs(parameter_count(matched) / parameter_count(original) - 1) <= 0.01


@pytest.mark.parametrize(("bias", "step"), [("rotary", 2), ("simple", 1)])
def test_a_single_heads_width_is_even_where_it_is_turned(bias: str, step: int) -> None:
    original = config(hidden_size=9, bias=bias, shared_size=6, value_size=30)
    widths = set()
    for ffn_size in range(20, 60, 5):
        original.ffn_size = ffn_size
        widths.add(parameter_matched(original, "tcncgsha", tolerance=0.2).hidden_size % 2)
    assert widths == ({0} if step == 2 else {0, 1})


def test_matching_says_where_it_cannot() -> None:
    tiny = config(num_heads=8, hidden_size=16, value_size=50)
    with pytest.raises(UnsupportedError, match=r"no width in steps of 16 gives mixer .tcncmha. within 1\.0%"):
        parameter_matched(tiny, "tcncmha")
    assert parameter_matched(tiny, "tcncmha", tolerance=0.5).mixer == "tcncmha"
    with pytest.raises(ModelError, match="mixer = 'lstm'"):
        parameter_matched(tiny, "lstm")


BAD = [
    ({"mixer": "lstm"}, "mixer"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": 16.5}, "hidden_size"),
    ({"value_size": 0}, "value_size"),
    ({"ffn_size": 0}, "ffn_size"),
    ({"shared_size": 0}, "shared_size"),
    ({"shared_size": 7}, "shared_size"),
    ({"num_layers": 0}, "num_layers"),
    ({"chunk_size": 0}, "chunk_size"),
    ({"attention": "linear"}, "attention"),
    ({"bias": "alibi"}, "bias"),
    ({"num_heads": 0}, "num_heads"),
    ({"num_heads": 3, "mixer": "tcncmha"}, "num_heads"),
    ({"hidden_size": 18, "num_heads": 6, "mixer": "transformer"}, "hidden_size"),
    ({"norm": "group"}, "norm"),
    ({"norm": "batch"}, "norm"),
    ({"tcn_norm": "batch"}, "tcn_norm"),
    ({"prenorm": 1}, "prenorm"),
    ({"state_size": 0}, "state_size"),
    ({"ema_algorithm": "scan"}, "ema_algorithm"),
    ({"kernel_size": 0}, "kernel_size"),
    ({"dilation_factor": 0}, "dilation_factor"),
    ({"dilation_factor": 50000, "tcn_depth": 3}, "dilation_factor"),
    ({"dilation_factor": 10**6, "tcn_depth": 4, "kernel_size": 1}, "dilation_factor"),
    ({"dilation_factor": 10**6, "tcn_depth": 2000}, "dilation_factor"),
    ({"tcn_depth": 0}, "tcn_depth"),
    ({"conv_implementation": "cudnn"}, "conv_implementation"),
    ({"positions": "learned"}, "positions"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"dropout": 1.0}, "dropout"),
    ({"attention_dropout": -0.1}, "attention_dropout"),
    ({"hidden_dropout": 2}, "hidden_dropout"),
    ({"pooling": "max"}, "pooling"),
    ({"inputs": "images"}, "inputs"),
    ({"initializer_range": 0.0}, "initializer_range"),
    ({"attention": "laplace", "mixer": "transformer"}, "attention"),
]


@pytest.mark.parametrize(("changes", "field"), BAD)
def test_a_field_out_of_range_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"SequenceConfig\.{field} = "):
        config(**changes)


def test_bad_inputs_are_refused() -> None:
    model = language_model()
    with pytest.raises(ModelError, match="at least 1"):
        model(tokens(2, 0))
    with pytest.raises(ModelError, match="token numbers"):
        model(torch.rand(2, 4))
    with pytest.raises(ModelError, match=r"attention_mask has shape \(2, 3\)"):
        model(tokens(2, 4), torch.ones(2, 3))
    with pytest.raises(ModelError, match="padded on the right only"):
        model(tokens(1, 4), torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ModelError, match="goes with inputs = 'pairs'"):
        classifier()(tokens(1, 4), input_ids_2=tokens(1, 4))
    with pytest.raises(ModelError, match="goes with inputs = 'pairs'"):
        classifier(inputs="pairs")(tokens(1, 4))
    with pytest.raises(ModelError, match="a language model reads tokens and is causal"):
        language_model(causal=False)
    with pytest.raises(ModelError, match="num_labels = 1"):
        classifier(num_labels=1)
    with pytest.raises(UnsupportedError, match="an encoder keeps no state"):
        classifier().model(tokens(1, 4), use_cache=True)


def test_the_simple_bias_refuses_more_positions_than_its_table_has() -> None:
    model = language_model(mixer="mega", bias="simple", chunk_size=None, max_position_embeddings=8)
    assert model(tokens(1, 8)).logits.isfinite().all()
    with pytest.raises(ModelError, match="9 tokens attend to each other"):
        model(tokens(1, 9))
