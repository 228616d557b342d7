"""What people type while thinking answers at once: ``--help`` and ``list`` import nothing that is heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: seconds of CPU time; the wall clock shows no more where a CPU is free
BOUND = 0.5
HEAVY = {"datasets", "deepspeed", "matplotlib", "mlflow", "numpy", "peft", "scipy", "sklearn", "torch", "transformers"}
PROGRAM = """
import json, sys, time
from pareto_runner.cli import main
try:
    main()
finally:
    print(json.dumps({"seconds": time.process_time(), "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def start(*arguments: str) -> tuple[float, set[str], str]:
    """CPU seconds, modules and output of one start of the command."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    seen = json.loads(run.stderr.splitlines()[-1])
    return seen["seconds"], set(seen["modules"]), run.stdout


@pytest.mark.parametrize(("arguments", "word"), [(("--help",), "bench"), (("list",), "krona_vs_lora")])
def test_help_and_list_answer_at_once(arguments: tuple[str, ...], word: str) -> None:
    seconds = []
    for _ in range(5):  # a first start compiles, and a busy machine takes CPU time away: one good start is enough
        taken, _, output = start(*arguments)
        assert word in output
        seconds.append(taken)
        if taken < BOUND:
            return
    pytest.fail(f"pareto {' '.join(arguments)} took {min(seconds):.2f} s of CPU time at best, over {BOUND} s")


@pytest.mark.parametrize("arguments", [("--help",), ("list",), ("bench", "--help")])
def test_they_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    _, modules, _ = start(*arguments)
    assert not modules & HEAVY
    assert "pareto_runner.benchfile" not in modules  # which brings pydantic
