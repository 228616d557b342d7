"""``python -m pareto_cpu_runtime.peers --out DIR``: the same random decoder in each runtime, timed in turns.

Whole models: this runtime at group sizes 32 and 128 beside llama.cpp with Q4_0 weights repacked for this processor,
first token and next token, and eight requests at a time beside one. Linear layers alone: beside OpenVINO and torch's
INT4 operator at equal group size. The machine's limits are measured between turns. Answers are compared before anything
is timed.

The others are not dependencies of Pareto: ``pip install llama-cpp-python gguf openvino`` into this environment, or into
another one that ``--python`` names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from pareto_core import DataError, ModelError
from pareto_cpu_runtime.peers import compare, report
from pareto_cpu_runtime.peers.geometry import Geometry


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pareto_cpu_runtime.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--out", type=Path, default=Path("results/peers"), help="where the tables go")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the other runtimes")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({cpus, 1}, reverse=True), help="thread counts")
    parser.add_argument("--turns", type=int, default=15, help="turns of each case; the longest take a third as many")
    parser.add_argument("--layers", type=int, default=Geometry().layers, help="of the decoder; fewer for a quick look")
    parser.add_argument("--only", choices=["models", "together", "layers"], help="one comparison")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and write them."""
    asked = parse(arguments)
    geometry = Geometry(layers=asked.layers)
    asked.out.mkdir(parents=True, exist_ok=True)
    found: list[compare.Table] = []
    served: list[compare.Together] = []
    try:
        with tempfile.TemporaryDirectory(prefix="pareto-peers-") as folder:
            for threads in asked.threads:
                if asked.only in (None, "models"):
                    found.append(compare.models(geometry, Path(folder), asked.python, threads, asked.turns))
                if asked.only in (None, "together"):
                    served.append(compare.together(geometry, Path(folder), asked.python, threads, asked.turns))
                if asked.only in (None, "layers"):
                    found += compare.layers(geometry, asked.python, threads, asked.turns)
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = report.markdown(geometry, found, served)
    print(text)
    (asked.out / "peers.md").write_text(text, encoding="utf-8")
    (asked.out / "peers.json").write_text(
        json.dumps([table.to_json() for table in (*found, *served)], indent=1), encoding="utf-8"
    )
    print(f"written: {asked.out / 'peers.md'}, {asked.out / 'peers.json'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
