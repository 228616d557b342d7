"""Child processes: answers, logs, and every way of ending."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pareto_runner import isolate
from pareto_runner.isolate import Child, ChildError, binding, environment, worker_command

ECHO = """
import json, os, signal, subprocess, sys, time
print("noise before")
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "die": os.kill(os.getpid(), signal.SIGKILL)
    if command["do"] == "leave": print("last words", file=sys.stderr); sys.exit(3)
    if command["do"] == "fail": print('@pareto {"error": "no such thing", "kind": "unsupported"}', flush=True)
    if command["do"] == "hang": time.sleep(60)
    if command["do"] == "cut": print('@pareto {"half": 1', flush=True); sys.exit(4)
    if command["do"] == "bytes": sys.stdout.buffer.write(b"\\xff\\xfe\\n"); sys.stdout.flush()
    if command["do"] == "orphan":  # a grandchild that keeps the pipe open
        grandchild = subprocess.Popen(["sleep", "60"]); print(grandchild.pid, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    print("noise between"); print("@pareto " + json.dumps({"heard": command["do"]}), flush=True)
"""


def ends(pid: int, within: float = 10) -> bool:
    """Whether a process is gone (or a zombie) within some seconds."""
    status = Path("/proc") / str(pid) / "status"
    deadline = time.monotonic() + within
    while True:
        try:
            if "State:\tZ" in status.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child([sys.executable, "-c", ECHO], tmp_path / "logs" / "child.log", environment(1), limit=10)


def test_answers_are_separated_from_noise(child: Child) -> None:
    with child:
        assert child.ask(do="one") == {"heard": "one"}
        assert child.ask(do="bytes") == {"heard": "bytes"}
        assert child.tail().splitlines() == ["noise before", "noise between", "��", "noise between"]


def test_a_killed_child_is_told_by_its_signal(child: Child) -> None:
    with child, pytest.raises(ChildError, match=r"was killed by SIGKILL$") as caught:
        child.ask(do="die")
    assert caught.value.log == "noise before"


def test_a_kill_by_the_kernel_for_want_of_memory_is_told_apart(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "out_of_memory_kills", lambda: child._out_of_memory_before + 1)
    with child, pytest.raises(ChildError, match="out of memory"):
        child.ask(do="die")


def test_a_child_that_leaves_gives_its_status_and_last_words(child: Child) -> None:
    with child:
        with pytest.raises(ChildError, match=r"ended with status 3: \w") as caught:
            child.ask(do="leave")
        assert "last words" in caught.value.log.splitlines()
        with pytest.raises(ChildError, match="status 3"):
            child.ask(do="anything")


def test_a_reported_error_keeps_its_kind(child: Child) -> None:
    with child, pytest.raises(ChildError, match="no such thing") as caught:
        child.ask(do="fail")
    assert caught.value.kind == "unsupported"


def test_a_message_cut_short_by_the_end_is_not_an_answer(child: Child) -> None:
    with child, pytest.raises(ChildError, match="status 4"):
        child.ask(do="cut")


def test_a_child_that_hangs_is_ended_at_its_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    child = Child([sys.executable, "-c", ECHO], tmp_path / "log", environment(1), limit=1)
    with child, pytest.raises(ChildError, match=r"hung: it said nothing for 1 s"):
        child.ask(do="hang")
    assert time.monotonic() - start < 8


def test_a_descendant_does_not_outlive_its_child_nor_block_the_parent(child: Child) -> None:
    start = time.monotonic()
    with child, pytest.raises(ChildError, match="SIGKILL") as caught:
        child.ask(do="orphan")
    assert time.monotonic() - start < 8
    assert ends(int(caught.value.log.splitlines()[-1]))


def test_a_program_that_is_not_there_is_an_error_like_others(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="could not be started"):
        Child([str(tmp_path / "nothing")], tmp_path / "log", {})


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_ends_with_its_parent_busy_or_not(tmp_path: Path, busy: bool) -> None:
    code = "import time; from pareto_runner.worker import follow_parent; follow_parent()\n"
    code += "while True: pass" if busy else "time.sleep(60)"
    parent = f"""
import sys
from pathlib import Path
from pareto_runner.isolate import Child, environment
child = Child([sys.executable, "-c", {code!r}], Path({str(tmp_path / "log")!r}), environment(1))
print(child.pid, flush=True)
child.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    time.sleep(1)
    assert not ends(worker, within=0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ends(worker)


def test_several_processes_go_through_deepspeeds_launcher() -> None:
    command = worker_command("prepare", "a", processes=2)
    assert command[1:3] == ["-m", "deepspeed.launcher.launch"]
    assert command[-3:] == ["pareto_runner.worker", "prepare", "a"]
    assert "--module" in command


def test_a_child_has_a_rendezvous_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("RANK", "1")
    assert not {"MASTER_PORT", "RANK"} & environment().keys()


def test_processes_share_the_cpus_that_may_be_used() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    assert environment()["OMP_NUM_THREADS"] == str(len(cpus))
    shared = environment(processes=2, accelerator="cpu")
    assert shared["OMP_NUM_THREADS"] == str(max(1, len(cpus) // 2))
    assert shared["DS_ACCELERATOR"] == "cpu"
    assert binding()["OMP_PLACES"] == ",".join(f"{{{cpu}}}" for cpu in cpus)


def test_kills_for_want_of_memory_are_counted_in_the_own_control_group(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("5:devices:/\n4:memory:/a/b\n0::/c\n")
    (first,) = isolate.memory_counters(own, tmp_path)
    assert first == tmp_path / "memory/a/b/memory.oom_control"
    own.write_text("0::/c/d\n")
    (second,) = isolate.memory_counters(own, tmp_path)
    assert second == tmp_path / "c/d/memory.events"
    own.write_text("")
    assert isolate.memory_counters(own, tmp_path) == []
    assert isolate.memory_counters(tmp_path / "missing") == []


def test_the_group_s_counter_goes_before_the_machine_s(tmp_path, monkeypatch):
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    monkeypatch.setattr(isolate, "memory_counters", lambda: [counter])
    assert isolate.out_of_memory_kills() == 2
    counter.unlink()
    machine = next(line for line in Path("/proc/vmstat").read_text().splitlines() if line.startswith("oom_kill "))
    assert isolate.out_of_memory_kills() >= int(machine.split()[1])
