from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from models import tiny

from pareto_core.errors import ConfigError, DataError, ModelError, UnsupportedError
from pareto_cpu_runtime.batching import Engine, Request
from pareto_cpu_runtime.runtime import Runtime
from pareto_cpu_runtime.sampling import Sampling


@pytest.fixture(scope="module")
def runtime():
    return Runtime.from_pretrained(tiny("qwen2"), slots=6, max_length=64, max_rows=24, threads=2)


def requests(count, seed=0):
    """Requests of all lengths, greedy and sampled, some with stop tokens, some with a penalty."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        length = draw.choice([1, 2, 7, 24, 25, 40])
        sampling = Sampling(
            do_sample=draw.random() < 0.5,
            temperature=1.2,
            top_k=draw.choice([0, 20]),
            top_p=draw.choice([1.0, 0.9]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
            seed=number,
        )
        made.append(
            Request(
                tokens=[draw.randrange(3, 99) for _ in range(length)],
                max_new_tokens=draw.randrange(1, 15),
                stop_tokens=tuple(draw.sample(range(99), draw.choice([0, 10]))),
                sampling=sampling,
            )
        )
    return made


def test_a_thousand_requests_that_join_and_leave_get_what_they_get_alone(runtime):
    asked = requests(1000)
    engine, draw = Engine(runtime), random.Random(1)
    handles, waiting, cancelled = [], list(asked), set()
    while waiting or not all(handle.done for handle in handles):
        joining = draw.choice([0, 0, 1, 5])
        handles += [engine.submit(request) for request in waiting[:joining]]
        waiting = waiting[joining:]
        engine.step()
        if draw.random() < 0.05 and handles:
            number = draw.randrange(len(handles))
            if not handles[number].done:
                handles[number].cancel()
                cancelled.add(number)
    assert runtime.slots.free == 6
    assert 5 < len(cancelled) < 200
    alone = Engine(runtime)
    for number, (request, handle) in enumerate(zip(asked, handles, strict=True)):
        expected = alone.submit(request).result()
        if number in cancelled:
            assert handle.finish_reason == "cancelled"
            assert handle.tokens == expected[: len(handle.tokens)]
        else:
            assert handle.tokens == expected
            assert handle.finish_reason in ("stop", "length")
    assert sum(len(handle.tokens) for handle in handles) > 4000


def test_logits_of_a_row_do_not_depend_on_the_rows_beside_it(runtime):
    text = np.arange(5, 25, dtype=np.int32)
    positions = np.arange(20, dtype=np.int32)
    alone = runtime.forward(text, np.zeros(20, np.int32), positions, positions)
    beside = np.concatenate([text[::-1], text])
    slots = np.repeat(np.array([2, 1], np.int32), 20)
    both = runtime.forward(beside, slots, np.tile(positions, 2), np.arange(20, 40, dtype=np.int32))
    assert np.array_equal(alone, both)
    one = [
        runtime.forward(text[i : i + 1], np.full(1, 3, np.int32), positions[i : i + 1], np.zeros(1, np.int32))
        for i in range(20)
    ]
    assert np.array_equal(alone, np.concatenate(one))


def test_a_request_that_does_not_fit_is_refused_and_the_others_go_on(runtime):
    engine = Engine(runtime)
    good = engine.submit(Request(tokens=[5, 6], max_new_tokens=63))
    for bad in (
        Request(tokens=[5] * 60, max_new_tokens=6),
        Request(tokens=[5] * 65, max_new_tokens=1),
        Request(tokens=[5, 99]),
        Request(tokens=[]),
        Request(tokens=[[5, 6]]),
        Request(tokens=[[5], [6, 7]]),
        Request(tokens=5),
        Request(tokens=[5.0]),
    ):
        with pytest.raises(DataError):
            engine.submit(bad)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        engine.submit(Request(tokens=[5], max_new_tokens=0))
    assert len(good.result()) == 63
    assert runtime.slots.free == 6


def test_what_a_callback_raises_ends_its_request_and_is_raised_there_alone(runtime):
    engine = Engine(runtime)

    def fail(*_):
        raise KeyError("mine")

    asked = Request(tokens=[5, 6], max_new_tokens=5)
    bad = engine.submit(asked, fail)
    stopped = engine.submit(Request(tokens=[5, 6], max_new_tokens=5, stop=fail))
    good = engine.submit(asked)
    assert len(good.result()) == 5
    for handle in (bad, stopped):
        assert handle.finish_reason == "error"
        with pytest.raises(KeyError, match="mine"):
            handle.result()
        with pytest.raises(KeyError, match="mine"):
            list(handle)
    assert runtime.slots.free == 6


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_interrupt_in_a_callback_leaves_the_others_what_they_get_alone(runtime, place):
    asked = [request for request in requests(40, seed=6) if request.max_new_tokens > 4 and not request.stop_tokens][:3]
    alone = Engine(runtime)
    expected = [alone.submit(request).result() for request in asked]
    engine = Engine(runtime)

    def interrupt(token):
        if len(handles[place].tokens) == 3:
            raise KeyboardInterrupt

    handles = [engine.submit(request, interrupt if i == place else None) for i, request in enumerate(asked)]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    for i, handle in enumerate(handles):
        assert handle.tokens == (expected[i][:3] if i == place else expected[i])
    assert handles[place].finish_reason == "error"
    with pytest.raises(UnsupportedError, match="interrupted by KeyboardInterrupt"):
        handles[place].result()
    assert runtime.slots.free == 6


def test_an_interrupt_in_the_model_changes_nothing(runtime, monkeypatch):
    asked = requests(4, seed=8)
    alone = Engine(runtime)
    expected = [alone.submit(request).result() for request in asked]
    engine, forward, calls = Engine(runtime), runtime.forward, []

    def interrupted(*rows):
        calls.append(1)
        if len(calls) in (1, 4):
            raise KeyboardInterrupt
        return forward(*rows)

    monkeypatch.setattr(runtime, "forward", interrupted)
    handles = [engine.submit(request) for request in asked]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.run()
    engine.run()
    assert [handle.tokens for handle in handles] == expected
    assert runtime.slots.free == 6


def test_a_model_that_fails_ends_the_batch_with_the_reason(runtime, monkeypatch):
    engine, forward = Engine(runtime), runtime.forward

    def fail(*_):
        raise MemoryError("of the model")

    handles = [engine.submit(request) for request in requests(8)]
    monkeypatch.setattr(runtime, "forward", fail)
    with pytest.raises(MemoryError, match="of the model"):
        engine.step()
    monkeypatch.setattr(runtime, "forward", forward)
    engine.run()
    ended = [handle for handle in handles if handle.finish_reason == "error"]
    assert 1 <= len(ended) <= 6
    for handle in ended:
        with pytest.raises(UnsupportedError, match="could not be run: of the model"):
            handle.result()
    assert runtime.slots.free == 6


def test_a_callback_may_run_requests_but_not_wait_for_its_own_step(runtime):
    asked = Request(tokens=[5, 6], max_new_tokens=3)
    expected = Engine(runtime).submit(asked).result()
    engine, inner = Engine(runtime), []
    outer = engine.submit(asked, lambda _: inner.append(engine.submit(asked).result()))
    other = engine.submit(asked)
    assert outer.result() == other.result() == expected
    assert inner == [expected] * 3
    engine = Engine(runtime)
    first = engine.submit(asked, lambda _: second.result())
    second = engine.submit(asked)
    with pytest.raises(UnsupportedError, match="wait outside"):
        first.result()
    assert second.result() == expected
    assert runtime.slots.free == 6


def test_a_prompt_that_changes_after_it_was_submitted_counts_as_it_was(runtime):
    text = np.array([5, 6, 7], dtype=np.int32)
    expected = Engine(runtime).submit(Request(tokens=text)).result()
    engine = Engine(runtime)
    handle = engine.submit(Request(tokens=text))
    text[:] = 500
    assert handle.result() == expected


def test_logits_that_are_not_finite_end_the_request_with_the_reason(runtime, monkeypatch):
    engine = Engine(runtime)
    handle = engine.submit(Request(tokens=[5, 6]))
    monkeypatch.setattr(runtime, "forward", lambda *_: np.full((1, 99), np.nan, np.float32))
    with pytest.raises(ModelError, match="not finite"):
        handle.result()
    assert runtime.slots.free == 6


def test_tokens_stream_to_several_threads(runtime):
    engine, got = Engine(runtime), {}
    asked = requests(12, seed=4)

    def serve(number):
        got[number] = list(engine.submit(asked[number]))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    alone = Engine(runtime)
    assert got == {number: alone.submit(request).result() for number, request in enumerate(asked)}


def test_sampling_draws_from_the_models_distribution(runtime):
    text = np.array([5, 6, 7], dtype=np.int32)
    logits = runtime.forward(text, np.zeros(3, np.int32), np.arange(3, dtype=np.int32), np.array([2], np.int32))[0]
    sampling = Sampling(do_sample=True, top_k=5, temperature=0.7)
    engine = Engine(runtime)
    made = [
        Request(tokens=text, max_new_tokens=1, sampling=Sampling(**{**sampling.to_json(), "seed": s}))
        for s in range(600)
    ]
    handles = [engine.submit(request) for request in made]
    engine.run()
    counts = np.bincount([handle.tokens[0] for handle in handles], minlength=99)
    scores = torch.from_numpy(logits) / 0.7
    kept = scores >= scores.topk(5).values[-1]
    expected = torch.softmax(scores.masked_fill(~kept, -torch.inf), 0).numpy() * 600
    assert counts[expected == 0].sum() == 0
    chi2 = (((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum()
    assert chi2 < 23.5  # 4 degrees of freedom, p = 1e-4
