from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from cpus import needs_cpus
from models import tiny

from pareto_core.errors import ConfigError, UnsupportedError
from pareto_cpu_runtime.families import describe
from pareto_cpu_runtime.parallel import ParallelRuntime, WorkerError
from pareto_cpu_runtime.runtime import Runtime
from pareto_cpu_runtime.shard import cpu_sets, ffn_range, shard


@needs_cpus
@pytest.mark.parametrize(("kind", "beams"), [("llama-bias", 2), ("falcon", 1)])
def test_two_processes_compute_what_one_does(tmp_path, kind, beams):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 99, (2, 21))
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with ParallelRuntime(tmp_path, precision=None, cache_dtype="fp32", max_rows=16) as runtime:
        logits = runtime(input_ids=ids).logits
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, **options)
        assert runtime.generate(ids, num_beams=beams, **options).tolist() == wanted.tolist()
        single = Runtime.from_pretrained(tmp_path, precision=None)
        assert runtime.weight_bytes < single.weight_bytes


@needs_cpus
def test_a_worker_that_dies_or_hangs_ends_the_call_with_an_error(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    ids = torch.randint(3, 99, (1, 5))
    expected = Runtime.from_pretrained(tmp_path)(input_ids=ids).logits
    # Dead before the call, or silent in it.
    for sent, message in ((signal.SIGKILL, "exit -9"), (signal.SIGSTOP, "did not answer within 2")):
        runtime = ParallelRuntime(tmp_path, timeout_s=2)
        logits = runtime(input_ids=ids).logits
        assert float((logits - expected).abs().max() / expected.abs().max()) < 0.03
        runtime._workers[0].send_signal(sent)
        start = time.monotonic()
        if sent == signal.SIGKILL:
            runtime._workers[0].wait()
        with pytest.raises(WorkerError, match=message):
            runtime(input_ids=ids)
        assert time.monotonic() - start < 60
        with pytest.raises(WorkerError, match="closed"):
            runtime(input_ids=ids)
        assert runtime._workers[0].poll() is not None


@needs_cpus
def test_threads_that_call_together_get_what_they_get_alone(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    texts = [torch.randint(3, 99, (1, 40), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    with ParallelRuntime(tmp_path, timeout_s=30, max_rows=20) as runtime:
        expected = [runtime(input_ids=text).logits for text in texts]
        beams = runtime.generate(texts[0][:, :5], num_beams=2, max_new_tokens=8, eos_token_id=None)
        equal: list[bool] = []

        def score(number):
            equal.extend(torch.equal(runtime(input_ids=texts[number]).logits, expected[number]) for _ in range(10))

        threads = [threading.Thread(target=score, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(3):  # copies slots, too
            got = runtime.generate(texts[0][:, :5], num_beams=2, max_new_tokens=8, eos_token_id=None)
            equal.append(torch.equal(got, beams))
        for thread in threads:
            thread.join(timeout=120)
    assert equal == [True] * 23


@needs_cpus
def test_every_process_computes_on_its_own_cpus(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    before = os.sched_getaffinity(0)
    with ParallelRuntime(tmp_path) as runtime:
        mine, theirs = (set(cpus) for cpus in runtime._sets)
        runtime(input_ids=torch.randint(3, 99, (1, 5)))
        pid, seen = runtime._workers[0].pid, set()
        for task in os.listdir(f"/proc/{pid}/task"):
            assert os.sched_getaffinity(int(task)) <= theirs
        ids = torch.randint(3, 99, (1, 100))
        caller = threading.Thread(target=lambda: [runtime(input_ids=ids) for _ in range(6)])
        caller.start()
        while caller.is_alive():
            try:
                seen.add(frozenset(os.sched_getaffinity(caller.native_id)))
            except ProcessLookupError:  # it has ended meanwhile
                break
        assert any(cpus <= mine for cpus in seen)
        assert not any(cpus <= theirs for cpus in seen)
    assert os.sched_getaffinity(0) == before


@needs_cpus
def test_a_call_that_is_interrupted_never_gives_wrong_sums(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    ids = torch.randint(3, 99, (1, 5))

    def interrupted(*_):
        raise KeyboardInterrupt

    with ParallelRuntime(tmp_path, timeout_s=10) as runtime:
        monkeypatch.setattr(Runtime, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime(input_ids=ids)
        monkeypatch.undo()
        with pytest.raises(WorkerError, match=r"interrupted|exit"):
            runtime(input_ids=ids)


@needs_cpus
def test_a_child_process_is_told_that_the_workers_are_its_parents(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    ids = torch.randint(3, 99, (1, 5))
    with ParallelRuntime(tmp_path, timeout_s=10) as runtime:
        expected = runtime(input_ids=ids).logits
        child = os.fork()
        if child == 0:
            try:
                runtime(input_ids=ids)
            except WorkerError as error:
                runtime.close()
                os._exit(0 if "in its child" in str(error) else 3)
            os._exit(4)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(runtime(input_ids=ids).logits, expected)


@needs_cpus
def test_what_cannot_be_split_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="ranks"):
        ParallelRuntime(tmp_path, ranks=0)
    with pytest.raises(UnsupportedError, match="processes need a CPU each"):
        ParallelRuntime(tmp_path, ranks=4096)
    with pytest.raises(UnsupportedError, match="kv_heads = 2 cannot be split over 4"):
        shard(describe(tiny("llama").config), 0, 4)


def test_the_parts_make_the_whole():
    whole = describe(tiny("gpt_neox").config)
    parts = [shard(whole, rank, 2) for rank in range(2)]
    for kind in range(3):
        joined = np.concatenate([part.blocks[0].qkv.parts[kind].index for part in parts])
        assert np.array_equal(joined, whole.blocks[0].qkv.parts[kind].index)
    assert [part.blocks[1].down.columns for part in parts] == [(0, 32), (32, 96)]
    assert [part.ffn for part in parts] == [32, 64]
    assert [part.blocks[1].down.biased for part in parts] == [True, False]


def test_widths_are_split_between_groups():
    assert [ffn_range(5632, rank, 2) for rank in range(2)] == [(0, 2816), (2816, 5632)]
    assert [ffn_range(11008, rank, 4)[1] % 128 for rank in range(4)] == [0] * 4
    assert [ffn_range(7, rank, 3) for rank in range(3)] == [(0, 2), (2, 4), (4, 7)]
    with pytest.raises(UnsupportedError, match="width of 64 cannot be split over 3"):
        ffn_range(64, 0, 3)
    slopes = describe(tiny("mpt").config).slopes
    assert np.array_equal(shard(describe(tiny("mpt").config), 1, 2).slopes, slopes[2:])


def test_processes_get_whole_sockets():
    interleaved = {0: 0, 1: 1, 2: 0, 3: 1}
    assert cpu_sets([0, 1, 2, 3], interleaved, 2) == [[0, 2], [1, 3]]
    assert cpu_sets([4, 5, 6], {}, 2) == [[4], [5]]


def test_an_exchange_refuses_memory_that_it_cannot_use():
    from pareto_cpu_runtime._library import native

    def exchange(size=4096, ranks=2, rank=0, floats=64, timeout_s=1.0, shift=0):
        memory = np.zeros(size + 128, dtype=np.uint8)
        start = -memory.ctypes.data % 64 + shift
        return native().Exchange(memory[start : start + size], ranks, rank, floats, timeout_s)

    assert not exchange().stopped
    for bad in ({"size": 64}, {"rank": 2}, {"rank": -1}, {"floats": 0}, {"timeout_s": 0.0}, {"shift": 8}):
        with pytest.raises(ValueError, match=r"memory|rank|floats|timeout"):
            exchange(**bad)


def test_a_process_that_waits_alone_gives_up():
    from pareto_cpu_runtime._library import native

    memory = np.zeros(8192, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    exchange = native().Exchange(memory[start : start + 4096], 2, 0, 64, 0.2)
    program = native().Program(native().Pool(2), 4)
    x, y = program.buffer(16), program.buffer(16)
    program.embed(np.ones((3, 16), dtype=np.float32), x)
    program.all_reduce(exchange, x, y, y)
    program.finish()
    rows = np.zeros(4, dtype=np.int32)
    program.run(rows, rows, rows, rows[:0], np.empty((0, 0), dtype=np.float32))
    assert exchange.stopped
