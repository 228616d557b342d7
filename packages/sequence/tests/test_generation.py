import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.configuration import MIXERS, SequenceConfig
from pareto_sequence.generation import SequenceState, select_rows, tensors_of
from pareto_sequence.modeling import SequenceForCausalLM
from pareto_sequence.temporal import PREFILL_BLOCK, MaskedEMA

VOCABULARY = 17


def model(**changes: Any) -> SequenceForCausalLM:
    """A decoder of random weights, large enough that tokens differ in their logits."""
    small = {
        "vocab_size": VOCABULARY,
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
        "tcn_depth": 3,
    }
    torch.manual_seed(0)
    made = SequenceForCausalLM(SequenceConfig(**(small | changes))).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": "simple", "norm": "scale", "prenorm": False, "tcn_omega": True, "positions": "sinusoidal"},
    {"chunk_size": None, "norm": "rms", "tcn_norm": "scale", "ema_algorithm": "auto"},
]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("prompt", [1, 4, 5, 12])
def test_steps_after_a_prompt_equal_the_full_pass(mixer: str, options: dict[str, Any], prompt: int) -> None:
    decoder, ids = model(mixer=mixer, **options), tokens(3, 23)
    whole = decoder(ids).logits
    output = decoder(ids[:, :prompt], use_cache=True)
    torch.testing.assert_close(output.logits, whole[:, :prompt], rtol=1e-4, atol=1e-4)
    state = output.past_key_values
    for t in range(prompt, 23):
        assert state.get_seq_length() == t
        output = decoder(ids[:, t : t + 1], past_key_values=state)
        state = output.past_key_values
        torch.testing.assert_close(output.logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", ["mega", "tcncmha"])
def test_laplace_attention_steps_as_the_full_pass(mixer: str) -> None:
    decoder, ids = model(mixer=mixer, attention="laplace"), tokens(2, 13)
    state = decoder(ids[:, :7], use_cache=True).past_key_values
    rest = decoder(ids[:, 7:], past_key_values=state)
    torch.testing.assert_close(rest.logits, decoder(ids).logits[:, 7:], rtol=1e-4, atol=1e-4)
    assert rest.past_key_values.length == 13


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_steps_and_generates_as_its_full_pass(mixer: str) -> None:
    decoder, ids = model(mixer=mixer).bfloat16(), tokens(2, 13)
    whole = decoder(ids).logits
    state = decoder(ids[:, :6], use_cache=True).past_key_values
    rest = decoder(ids[:, 6:], past_key_values=state).logits
    assert rest.dtype == torch.bfloat16
    assert (rest.float() - whole[:, 6:].float()).abs().max() < 0.03 * whole.float().abs().max()
    assert decoder.generate(ids, max_new_tokens=3).shape == (2, 16)


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast_trains_and_generates_close_to_single_precision(mixer: str) -> None:
    decoder, ids = model(mixer=mixer), tokens(2, 13)
    expected = decoder(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(ids, labels=ids)
        assert decoder.generate(ids, max_new_tokens=3).shape == (2, 16)
    output.loss.backward()
    assert (output.logits.float() - expected).abs().max() < 0.06 * expected.abs().max()
    assert all(parameter.grad.dtype == torch.float32 for parameter in decoder.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_generation_equals_the_loop_over_full_passes(mixer: str) -> None:
    decoder, ids = model(mixer=mixer), tokens(3, 8)
    expected = ids
    for _ in range(14):
        expected = torch.cat([expected, decoder(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    for arguments in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
        generated = decoder.generate(ids, max_new_tokens=14, do_sample=False, **arguments)
        assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("mixer", MIXERS)
def test_beams_keep_their_own_state(mixer: str) -> None:
    decoder, ids = model(mixer=mixer), tokens(2, 6)
    arguments = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False}
    found = decoder.generate(ids, **arguments)
    assert found.tolist() == decoder.generate(ids, use_cache=False, **arguments).tolist()


def test_sampling_follows_the_seed_and_the_returned_sequences() -> None:
    decoder, ids = model(mixer="mega"), tokens(2, 6)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        runs.append(
            decoder.generate(
                ids, max_new_tokens=8, do_sample=True, top_k=6, num_return_sequences=3, use_cache=use_cache
            ).tolist()
        )
    assert runs[0] == runs[1]
    assert len(runs[0]) == 6
    assert len({tuple(row) for row in runs[0]}) > 2


def test_an_end_mark_stops_a_row_and_pads_it() -> None:
    decoder, ids = model(mixer="tcnca"), tokens(2, 6) % 15
    free = decoder.generate(ids, max_new_tokens=10, do_sample=False)
    end = int(free[0, 8])
    arguments = {"do_sample": False, "eos_token_id": end, "pad_token_id": 16}
    stopped = decoder.generate(ids, max_new_tokens=10, **arguments)
    for row in range(2):
        new = free[row, 6:].tolist()
        kept = new[: new.index(end) + 1] if end in new else new
        assert stopped[row, 6:].tolist() == kept + [16] * (stopped.shape[1] - 6 - len(kept))
    longer = decoder.generate(ids, min_new_tokens=7, max_new_tokens=10, **arguments)
    assert longer.shape[1] >= 13
    assert end not in longer[:, 6:12].tolist()[0]


class Heard(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_every_token() -> None:
    decoder, ids, heard = model(mixer="tcn"), tokens(1, 6), Heard()
    generated = decoder.generate(ids, max_new_tokens=5, do_sample=False, streamer=heard)
    assert heard.tokens == generated[0].tolist()
    assert heard.ended


def test_generation_continues_from_a_returned_state() -> None:
    decoder, ids = model(mixer="tcnca"), tokens(2, 7)
    whole = decoder.generate(ids, max_new_tokens=12, do_sample=False)
    first = decoder.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    state = first.past_key_values
    # The last token was chosen, not read.
    assert isinstance(state, SequenceState)
    assert state.length == 11
    second = decoder.generate(first.sequences, max_new_tokens=7, do_sample=False, past_key_values=state)
    assert second.tolist() == whole.tolist()


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "transformer"])
def test_the_state_does_not_grow_with_the_text(mixer: str) -> None:
    decoder, ids = model(mixer=mixer), tokens(2, 60)
    sizes = [decoder(ids[:, :length], use_cache=True).past_key_values.nbytes() for length in (10, 60)]
    assert sizes[0] == sizes[1]
    state = decoder(ids[:, :10], use_cache=True).past_key_values
    for t in range(10, 60):
        state = decoder(ids[:, t : t + 1], past_key_values=state).past_key_values
    assert state.nbytes() == sizes[0]


def test_a_step_reads_one_token_whatever_the_length_of_the_text() -> None:
    decoder = model(mixer="tcnca")
    state = decoder(tokens(1, 40), use_cache=True).past_key_values
    seen: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
        for module in decoder.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    decoder(tokens(1, 1), past_key_values=state)
    for hook in hooks:
        hook.remove()
    assert seen
    assert max(seen) <= 20


def test_padded_prompts_are_refused() -> None:
    decoder, ids = model(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with pytest.raises(UnsupportedError, match="hides positions in 1 of 2 prompts"):
        decoder.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_rows_of_a_state_are_selected_in_copies() -> None:
    decoder, ids = model(mixer="tcnca"), tokens(3, 9)
    state = decoder(ids, use_cache=True).past_key_values
    chosen = SequenceState(select_rows(state.layers, torch.tensor([2, 0])), state.length)
    other = decoder(ids[[2, 0]], use_cache=True).past_key_values
    for own, expected in zip(tensors_of(chosen.layers), tensors_of(other.layers), strict=True):
        torch.testing.assert_close(own, expected)
    before = [tensor.clone() for tensor in tensors_of(state.layers)]
    decoder(ids[[2, 0], :1], past_key_values=chosen)
    for own, expected in zip(tensors_of(state.layers), before, strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("length", [1, PREFILL_BLOCK, 2 * PREFILL_BLOCK + 37])
def test_the_emas_state_after_a_prompt_is_that_of_its_recurrence(length: int) -> None:
    torch.manual_seed(0)
    ema, x = MaskedEMA(3, 4), torch.randn(2, length, 3)
    with torch.no_grad():
        ema.alpha_logit[0] = -9.0
        ema.alpha_logit[1], ema.delta_logit[1] = 40.0, 40.0
    state = None
    for t in range(length):
        _, state = ema.step(x[:, t], state)
    torch.testing.assert_close(ema.state_after(x), state, rtol=1e-9, atol=1e-9)
    with pytest.raises(UnsupportedError, match="runs both ways"):
        MaskedEMA(3, 4, bidirectional=True).prefill(x)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_belongs_to_no_graph_and_can_be_copied(mixer: str) -> None:
    decoder, ids = model(mixer=mixer), tokens(2, 8)
    output = decoder(ids[:, :7], use_cache=True)
    assert output.logits.requires_grad  # the prompt itself is trained on as ever
    state = output.past_key_values
    assert not any(tensor.requires_grad for tensor in tensors_of(state.layers))
    twin = copy.deepcopy(state)
    first, second = (decoder(ids[:, 7:], past_key_values=each).logits for each in (state, twin))
    assert torch.equal(first, second)
    assert not any(tensor.requires_grad for tensor in tensors_of(state.layers))


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_continues_from_a_state_has_no_gradient(mixer: str) -> None:
    decoder, ids = model(mixer=mixer), tokens(2, 12)
    state = decoder(ids[:, :7], use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="labels with past_key_values"):
        decoder(ids[:, 7:], past_key_values=copy.deepcopy(state), labels=ids[:, 7:])
    with torch.no_grad():
        scored = decoder(ids[:, 7:], past_key_values=copy.deepcopy(state), labels=ids[:, 7:])
    whole = decoder(ids).logits[:, 7:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(whole, ids[:, 8:].flatten())
    torch.testing.assert_close(scored.loss, expected, rtol=1e-4, atol=1e-5)
    logits = decoder(ids[:, 7:], past_key_values=state).logits
    assert not logits.requires_grad  # a backward pass would be an error, rather than half a gradient


@pytest.mark.parametrize("mixer", MIXERS)
def test_reading_a_prompt_with_a_state_trains_as_without(mixer: str) -> None:
    decoder, ids = model(mixer=mixer), tokens(2, 9)
    parameters = list(decoder.parameters())
    plain = torch.autograd.grad(decoder(ids, labels=ids).loss, parameters)
    kept = torch.autograd.grad(decoder(ids, labels=ids, use_cache=True).loss, parameters)
    for one, other in zip(plain, kept, strict=True):
        torch.testing.assert_close(one, other)


def test_other_states_and_masks_are_refused() -> None:
    decoder, ids = model(), tokens(2, 6)
    with pytest.raises(ModelError, match="past_key_values is a DynamicCache: must be the SequenceState"):
        decoder(ids, past_key_values=DynamicCache())
    with pytest.raises(ModelError, match=r"attention_mask has shape \(5, 99\): must be the inputs' \(2, 6\)"):
        decoder(ids, attention_mask=torch.ones(5, 99), use_cache=True)
    state = decoder(ids, use_cache=True).past_key_values
    with pytest.raises(ModelError, match=r"\(2, 4\): must be the inputs' \(2, 1\), or \(2, 7\) with the 6 before"):
        decoder(ids[:, :1], attention_mask=torch.ones(2, 4), past_key_values=state)
    for columns in (1, 7):
        again = copy.deepcopy(state)
        assert decoder(ids[:, :1], attention_mask=torch.ones(2, columns), past_key_values=again).logits.isfinite().all()


def test_filters_that_span_billions_of_positions_generate() -> None:
    decoder, ids = model(mixer="tcnca", kernel_size=2, dilation_factor=2 * 10**9, tcn_depth=2), tokens(1, 11)
    found = decoder.generate(ids, max_new_tokens=3, do_sample=False)
    assert found.tolist() == decoder.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False).tolist()
