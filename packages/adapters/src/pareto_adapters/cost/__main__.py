"""``python -m pareto_adapters.cost --out DIR``: measure, print the tables, and write them."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pareto_adapters import cost
from pareto_adapters.cost import layers, models, tables
from pareto_core import DataError, ParetoError, UnsupportedError

WIDTHS = (768, 1024, 2048, 4096)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what no machine can do ends the program with the option's name."""
    parser = argparse.ArgumentParser(prog="python -m pareto_adapters.cost", description=cost.__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/cost"), help="where the tables go")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the layers' table")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="widths of the layers; none: no table")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each width, where turns are that short")
    parser.add_argument(
        "--models", nargs="*", choices=models.MODELS, default=models.MODELS, help="models whose latency is taken"
    )
    asked = parser.parse_args(arguments)
    if re.fullmatch(r"cpu|cuda(:\d+)?", asked.device) is None:
        parser.error(f"--device: {asked.device!r} is not cpu, cuda or cuda:N")
    if min(asked.widths, default=1) < 1:
        parser.error(f"--widths: {min(asked.widths)} is below 1")
    if not 0 <= asked.seconds < math.inf:
        parser.error(f"--seconds: {asked.seconds} is not a number of at least 0")
    return asked


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for; what cannot be done here is listed with its reason."""
    asked, code = parse(arguments), 0
    try:
        prepare(asked.device, asked.out)
        costs = tables.Costs(tables.machine(asked.device, getattr(torch, asked.dtype)))
        try:
            for measured in measure(asked, costs):
                costs = measured
                tables.write(costs, asked.out)  # at once: what is measured stays, whatever comes
        except KeyboardInterrupt:
            print("\ninterrupted: what was measured until now is kept", file=sys.stderr)
            code = 130
        written = tables.write(costs, asked.out)
    except (ParetoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tables.markdown(costs))
    for path in written:
        print(f"written: {path}", file=sys.stderr)
    return code


def prepare(device: str, out: Path) -> None:
    """Make the folder ``out``; raises OSError where it cannot be written, UnsupportedError where there is no device."""
    if device.startswith("cuda"):
        number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if number >= count:
            raise UnsupportedError(f"--device {device}: torch sees {count or 'no'} GPU{'s' * (count != 1)} here")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def measure(asked: argparse.Namespace, costs: tables.Costs) -> Iterator[tables.Costs]:
    """``costs`` after each table that was added, or left out with its reason."""
    dtype = getattr(torch, asked.dtype)
    for width in asked.widths:
        found = layers.measure(width, asked.seconds, asked.device, dtype, progress(f"layer of width {width}"))
        costs = dataclasses.replace(costs, widths=(*costs.widths, found))
        yield costs
    for name in asked.models:
        try:
            latencies = models.measure_latency(name, asked.device, progress(f"latency of {name}"))
            costs = dataclasses.replace(costs, latencies=(*costs.latencies, *latencies))
        except (UnsupportedError, DataError) as error:
            costs = dataclasses.replace(costs, left_out=(*costs.left_out, str(error)))
        yield costs
    try:
        memories = models.measure_memory(asked.device, progress("memory"))
        costs = dataclasses.replace(costs, memories=memories)
    except UnsupportedError as error:
        costs = dataclasses.replace(costs, left_out=(*costs.left_out, str(error)))
    yield costs


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
