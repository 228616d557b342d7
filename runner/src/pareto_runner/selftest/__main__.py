"""``python -m pareto_runner.selftest``: the same as ``pareto selftest``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from pareto_runner.selftest import run

parser = argparse.ArgumentParser(prog="python -m pareto_runner.selftest", description=__doc__)
parser.add_argument("--pairs", type=int, default=0, help="A/A pairs: equal processes that must not be told apart")
parser.add_argument("--planted", type=int, default=0, help="pairs with a slow-down of 10 %% that must be found")
parser.add_argument("--out", type=Path, default=Path("results/selftest"), help="where the files go")
arguments = parser.parse_args()
sys.exit(0 if run(arguments.out, arguments.pairs, arguments.planted, Console()) else 1)
