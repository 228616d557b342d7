from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cpus import CPUS, needs_cpus

from pareto_core.errors import ConfigError
from pareto_cpu_runtime import _native, memory
from pareto_cpu_runtime.pool import bound_to, made_pool, thread_count

TESTS = str(Path(__file__).parent)


def places() -> dict[int, list[int]]:
    """The CPUs that each thread of this process may run on."""
    return {int(task): sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}


def work(pool, repeats=1) -> np.ndarray:
    """A burst on all threads of the pool."""
    codes, scales = np.full((64, 64), 9, np.uint8), np.ones((64, 2), np.float16)
    data = np.empty(_native.packed_bytes(64, 64, 32), np.uint8)
    _native.pack(codes, scales.view(np.uint16), None, 4, data)
    y = np.empty((1, 64), np.float32)
    _native.multiply(pool, _native.Weight.of(data, 64, 64, 32), np.ones((1, 64), np.float32), y, repeats=repeats)
    return y


def workers_of(threads, cpus, **how):
    """The pool, and where its workers run once they have worked."""
    before = places()
    pool = made_pool(threads, cpus, **how)
    work(pool)
    return pool, [place for task, place in sorted(places().items()) if task not in before]


@needs_cpus
def test_workers_have_a_cpu_each_where_there_are_as_many_as_threads():
    pool, found = workers_of(len(CPUS), CPUS)
    assert pool.threads == len(CPUS)
    assert found == [[cpu] for cpu in CPUS[1:]]
    assert sorted(os.sched_getaffinity(0)) == CPUS


@needs_cpus
def test_small_pools_do_not_share_the_first_cpus():
    for threads in (len(CPUS) - 1, len(CPUS) + 1):
        pool, found = workers_of(threads, CPUS)
        assert found == [CPUS] * (threads - 1)
        assert pool.threads == threads


@needs_cpus
def test_workers_run_where_they_are_told_though_their_maker_is_bound():
    with bound_to(CPUS[:1]):
        assert sorted(os.sched_getaffinity(0)) == CPUS[:1]
        _, found = workers_of(len(CPUS) + 1, CPUS)
    assert found == [CPUS] * len(CPUS)
    assert sorted(os.sched_getaffinity(0)) == CPUS


@needs_cpus
@pytest.mark.parametrize("bind", [True, False])
def test_the_calling_thread_is_bound_for_the_time_of_a_burst_where_asked(bind):
    pool = made_pool(1, CPUS[-1:], bind_caller=bind)
    seen, after = set(), []

    def call():
        for _ in range(50):
            work(pool, repeats=5000)
        after.append(sorted(os.sched_getaffinity(0)))

    thread = threading.Thread(target=call)
    thread.start()
    while thread.is_alive():
        try:
            seen.add(tuple(sorted(os.sched_getaffinity(thread.native_id))))
        except ProcessLookupError:  # it has ended meanwhile
            break
    thread.join()
    assert ((CPUS[-1],) in seen) == bind
    assert after == [CPUS]


def test_threads_that_the_system_refuses_are_an_error():
    code = (
        "import resource; from pareto_core.errors import UnsupportedError\n"
        "from pareto_cpu_runtime.pool import made_pool\n"
        "made_pool(2, []); resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try: made_pool(1000, [])\n"
        "except UnsupportedError as error: print(error)\n"
        "made_pool(2, [])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "a runtime of 1000 threads cannot be made: the system refused thread" in done.stdout
    assert "ask for fewer threads" in done.stdout


def test_a_child_process_starts_threads_of_its_own():
    code = """
import os, sys, torch
from models import tiny
from pareto_cpu_runtime import Runtime
torch.set_num_threads(1)
runtime = Runtime.from_pretrained(tiny("llama"), threads=2)
ids = torch.tensor([[5, 6, 7]])
expected = runtime(input_ids=ids).logits
child = os.fork()
equal = torch.equal(runtime(input_ids=ids).logits, expected)
if child == 0:
    grandchild = os.fork()
    equal = equal and torch.equal(runtime(input_ids=ids).logits, expected)
    if grandchild:
        equal = equal and os.waitpid(grandchild, 0)[1] == 0
    sys.exit(0 if equal else 3)
status = os.waitpid(child, 0)[1]
sys.exit(0 if equal and status == 0 else 4)
"""
    environment = {**os.environ, "PYTHONPATH": TESTS}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, timeout=120, check=False)
    assert done.returncode == 0


def test_a_pool_that_a_child_inherits_and_never_uses_lets_it_end():
    code = """
import os, sys
from pareto_cpu_runtime.pool import made_pool
pool = made_pool(3, [])
child = os.fork()
if child == 0:
    del pool
    sys.exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("threads", [0, -1, 1025, 100_000])
def test_numbers_of_threads_that_no_machine_has_are_refused(threads):
    with pytest.raises(ConfigError, match=r"threads = .*must be 1 to 1024.*spinning"):
        thread_count(threads)
    with pytest.raises(ValueError, match="threads must be 1 to 1024"):
        _native.Pool(threads)


def test_threads_default_to_at_most_the_cpus():
    assert 1 <= thread_count(None) <= len(memory.cpus())
    assert thread_count(1024) == 1024


@pytest.mark.parametrize("cpus", [[-1], [1024]])
def test_cpus_that_are_none_are_refused(cpus):
    with pytest.raises(ValueError, match="numbers of CPUs"):
        _native.Pool(1, cpus)
