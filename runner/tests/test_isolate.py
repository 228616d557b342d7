"""Child processes: answers, logs, and every way of ending."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pareto_runner.isolate import Child, ChildError, binding, environment, worker_command

ECHO = """
import json, os, signal, sys
print("noise before")
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "die": os.kill(os.getpid(), signal.SIGKILL)
    if command["do"] == "leave": print("last words", file=sys.stderr); sys.exit(3)
    if command["do"] == "fail": print('@pareto {"error": "no such thing", "kind": "unsupported"}', flush=True)
    print("noise between"); print("@pareto " + json.dumps({"heard": command["do"]}), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child([sys.executable, "-c", ECHO], tmp_path / "logs" / "child.log", environment(1))


def test_answers_are_separated_from_noise(child: Child) -> None:
    with child:
        assert child.ask(do="one") == {"heard": "one"}
        assert child.ask(do="two") == {"heard": "two"}
        assert child.tail().splitlines() == ["noise before", "noise between", "noise between"]


def test_a_killed_child_is_told_by_its_signal(child: Child) -> None:
    with child, pytest.raises(ChildError, match=r"SIGKILL \(out of memory\?\)"):
        child.ask(do="die")


def test_a_child_that_leaves_gives_its_status_and_last_words(child: Child) -> None:
    with child:
        with pytest.raises(ChildError, match=r"(?s)status 3.*last words"):
            child.ask(do="leave")
        with pytest.raises(ChildError, match="status 3"):
            child.ask(do="anything")


def test_a_reported_error_keeps_its_kind(child: Child) -> None:
    with child, pytest.raises(ChildError, match="no such thing") as caught:
        child.ask(do="fail")
    assert caught.value.kind == "unsupported"


def test_several_processes_go_through_deepspeeds_launcher() -> None:
    command = worker_command("prepare", "a", processes=2)
    assert command[1:3] == ["-m", "deepspeed.launcher.launch"]
    assert command[-3:] == ["pareto_runner.worker", "prepare", "a"]
    assert "--module" in command


def test_processes_share_the_cpus_that_may_be_used() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    assert environment()["OMP_NUM_THREADS"] == str(len(cpus))
    shared = environment(processes=2, accelerator="cpu")
    assert shared["OMP_NUM_THREADS"] == str(max(1, len(cpus) // 2))
    assert shared["DS_ACCELERATOR"] == "cpu"
    assert binding()["OMP_PLACES"] == ",".join(f"{{{cpu}}}" for cpu in cpus)
