"""``python -m pareto_adapters.cost --out DIR``: measure, print the tables, and write them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pareto_adapters import cost
from pareto_adapters.cost import layers, models, tables
from pareto_core import UnsupportedError

WIDTHS = (768, 1024, 2048, 4096)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m pareto_adapters.cost", description=cost.__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/cost"), help="where the tables go")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the layers' table")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="widths of the layers; none: no table")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each width, where turns are that short")
    parser.add_argument(
        "--models", nargs="*", choices=models.MODELS, default=models.MODELS, help="models whose latency is taken"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for; what cannot be done here is listed with its reason."""
    asked = parse(arguments)
    dtype = getattr(torch, asked.dtype)
    left_out: list[str] = []
    latencies: list[models.Latency] = []
    memories: tuple[models.Memory, ...] = ()
    widths = tuple(
        layers.measure(width, asked.seconds, asked.device, dtype, progress(f"layer of width {width}"))
        for width in asked.widths
    )
    for name in asked.models:
        try:
            latencies += models.measure_latency(name, asked.device, progress(f"latency of {name}"))
        except UnsupportedError as error:
            left_out.append(str(error))
    try:
        memories = models.measure_memory(asked.device, progress("memory"))
    except UnsupportedError as error:
        left_out.append(str(error))
    costs = tables.Costs(tables.machine(asked.device, dtype), widths, tuple(latencies), memories, tuple(left_out))
    print(tables.markdown(costs))
    for path in tables.write(costs, asked.out):
        print(f"written: {path}", file=sys.stderr)
    return 0


def progress(what: str) -> Callable[[float], None]:
    """Return what shows the share that is done of ``what``, on one line of standard error; in a file, the end alone."""
    live = sys.stderr.isatty()

    def show(share: float) -> None:
        if live or share >= 1:
            text = f"\r{what}: {share:4.0%}" if live else f"{what}: done"
            print(text, end="\n" if share >= 1 else "", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
