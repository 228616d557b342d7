"""``python -m pareto_cpu_runtime.peers --out DIR``: the same random decoder in each runtime, timed in turns.

Whole models: this runtime at group sizes 32 and 128 beside llama.cpp with Q4_0 weights repacked for this processor,
first token and next token, and eight requests at a time beside one. Linear layers alone: beside OpenVINO and torch's
INT4 operator at equal group size. The machine's limits are measured between turns. Answers are compared before anything
is timed. Loading: seconds and peaks of memory, which need none of the others (--only loading).

The others are not dependencies of Pareto: ``pip install llama-cpp-python gguf openvino`` into this environment, or into
another one that ``--python`` names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pareto_core import DataError, ModelError
from pareto_cpu_runtime.peers import compare, report
from pareto_cpu_runtime.peers.geometry import Geometry
from pareto_cpu_runtime.peers.loading import Loading, loading


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
    parser.add_argument(
        "--threads", type=positive, nargs="+", default=sorted({cpus, 1}, reverse=True), help="thread counts"
    )
    parser.add_argument(
        "--turns", type=positive, default=15, help="turns of each case; the longest take a third as many"
    )
    parser.add_argument(
        "--layers", type=positive, default=Geometry().layers, help="of the decoder; fewer for a quick look"
    )
    parser.add_argument("--only", choices=["models", "together", "layers", "loading"], help="one comparison")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and write them; what was measured before a failure is written too."""
    asked = parse(arguments)
    found: list[compare.Table | compare.Together | Loading] = []
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pareto-peers-") as folder:
            for tables in comparisons(asked, Geometry(layers=asked.layers), Path(folder)):
                found += tables
                write(asked, found)
    except (OSError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted" + (": what is written stays" if found else ""), file=sys.stderr)
        return 130
    print(text_of(asked, found))
    print(f"written: {asked.out / 'peers.md'}, {asked.out / 'peers.json'}", file=sys.stderr)
    return 0


def comparisons(
    asked: argparse.Namespace, geometry: Geometry, folder: Path
) -> Iterator[Sequence[compare.Table | compare.Together | Loading]]:
    """Run what is asked for, one comparison after the other."""
    for threads in asked.threads:
        if asked.only in (None, "models"):
            yield [compare.models(geometry, folder, asked.python, threads, asked.turns)]
        if asked.only in (None, "together"):
            yield [compare.together(geometry, folder, asked.python, threads, asked.turns)]
        if asked.only in (None, "layers"):
            yield compare.layers(geometry, asked.python, threads, asked.turns)
        if asked.only in (None, "loading"):
            yield [loading(geometry, folder, threads, max(3, asked.turns // 3))]


def write(asked: argparse.Namespace, found: Sequence[compare.Table | compare.Together | Loading]) -> None:
    """Write all tables so far."""
    (asked.out / "peers.md").write_text(text_of(asked, found), encoding="utf-8")
    whole = json.dumps([table.to_json() for table in found], indent=1)
    (asked.out / "peers.json").write_text(whole, encoding="utf-8")


def text_of(asked: argparse.Namespace, found: Sequence[compare.Table | compare.Together | Loading]) -> str:
    """The tables in Markdown."""
    return report.markdown(Geometry(layers=asked.layers), found)


def positive(text: str) -> int:
    """A whole number above 0, or argparse's message."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
