"""``python -m pareto_sequence.cost --out DIR``: measure, print the tables, and write them and their pictures."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from pareto_core import ParetoError, UnsupportedError
from pareto_sequence import cost
from pareto_sequence.cost import plots, tables
from pareto_sequence.cost.turns import OUT_OF_MEMORY, Row, Settings, is_out_of_memory, limit_memory

TABLES = tuple(tables.TITLES)
#: (decoding, EMA state) of Figs. 7.5, 7.6 and 7.7
FIGURES = {"7.5": (False, 16), "7.6": (True, 16), "7.7": (True, 60)}
EXAMPLES = """examples:
  python -m pareto_sequence.cost --quick                       every table on tiny sizes: does it work here?
  python -m pareto_sequence.cost --only convolution            the own kernel beside torch's, 1k to 64k positions
  python -m pareto_sequence.cost --only models --figures 7.6   one grid of the chapter
  python -m pareto_sequence.cost --only models --widths 512 --lengths 4096 16384
  python -m pareto_sequence.cost --device cuda                 the same on a GPU

Long sequences on a CPU depend on the C library's allocator: by default it returns large blocks to the system and takes
them back, page by page, in each pass. "--malloc kept" keeps them, for all cases alike. Report both."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``--quick`` replaces the sizes that were not given."""
    parser = argparse.ArgumentParser(
        prog="python -m pareto_sequence.cost",
        description=cost.__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("results/sequence-cost"), help="where tables and pictures go")
    add("--only", nargs="+", choices=TABLES, default=TABLES, help="these tables")
    add("--quick", action="store_true", help="tiny sizes and few turns: figures are worth nothing")
    add("--device", default="cpu", type=device, help="cpu, cuda or cuda:N")
    add("--threads", type=int, help="of torch, on the CPU; default: torch's own choice")
    add("--malloc", choices=["default", "kept"], default="default", help="what the C library does with freed memory")
    add("--memory", type=float, help="GiB that the CPU's cases may take, beyond which they count as out of memory")
    add("--seconds", type=float, default=10.0, help="time for each group of cases, where its turns are that short")
    add("--lengths", type=int, nargs="+", help="of the sequences")
    add("--widths", type=int, nargs="+", help="embedding dimensions of the models")
    add("--width", type=int, help="channels of the convolution, ema and tokens tables")
    add("--dilations", type=int, nargs="+", help="of the convolution table")
    add("--kernel-size", type=int, default=15, help="K of the convolution table")
    add("--states", type=int, nargs="+", help="EMA states of the ema table")
    add("--figures", nargs="+", choices=FIGURES, default=list(FIGURES), help="grids of the models table")
    add("--layers", type=int, help="of the models; 8 in the chapter")
    add("--chunk", type=int, help="of the attention; 1024 in the chapter")
    asked = parser.parse_args(arguments)
    for name in ("lengths", "widths", "width", "dilations", "states", "layers", "chunk", "kernel_size", "threads"):
        given = getattr(asked, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    if not (asked.seconds >= 0 and math.isfinite(asked.seconds)):
        parser.error("--seconds: must be a finite number, not negative")
    if asked.memory is not None and not (asked.memory > 0 and math.isfinite(asked.memory)):
        parser.error("--memory: must be a finite number of GiB above 0")
    return asked


def device(text: str) -> str:
    """``text`` where it names a CPU or a GPU of CUDA; raises what argparse shows for anything else."""
    kind, _, number = text.partition(":")
    if text == "cpu" or (kind == "cuda" and (number.isdecimal() or text == "cuda")):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda and cuda:N")


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for; what cannot be done here is listed with its reason."""
    asked = parse(arguments)
    code = 0
    try:
        prepare(asked)
        asked.out.mkdir(parents=True, exist_ok=True)
        costs = tables.Costs(tables.machine(asked.device, asked.malloc))
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
    try:
        written += plots.draw(costs, asked.out)
    except UnsupportedError as error:
        print(f"no pictures: {error}", file=sys.stderr)
    for path in written:
        print(f"written: {path}", file=sys.stderr)
    return code


def prepare(asked: argparse.Namespace) -> None:
    """Set threads, allocator and limits for this process; the same fp32 arithmetic for everything."""
    if asked.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UnsupportedError(f"--device {asked.device}: torch sees no GPU here")
        if (torch.device(asked.device).index or 0) >= torch.cuda.device_count():
            raise UnsupportedError(f"--device {asked.device}: torch sees GPUs 0 to {torch.cuda.device_count() - 1}")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    if asked.malloc == "kept":
        keep_freed_memory()
    if not asked.device.startswith("cuda"):
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit_memory(asked.memory if asked.memory is not None else 0.9 * pages / 2**30)


def keep_freed_memory() -> None:
    """Have the C library serve large blocks from its heap and keep the heap (mallopt); raises UnsupportedError."""
    trim_threshold, mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(mmap_max, 0) and mallopt(trim_threshold, -1)):
        raise UnsupportedError("--malloc kept: this C library has no mallopt")


def measure(asked: argparse.Namespace, costs: tables.Costs) -> Iterator[tables.Costs]:
    """``costs`` after each row that was added, and with the reasons of the tables that cannot be made here."""
    measures: dict[str, Callable[[argparse.Namespace, Settings], Iterator[Row]]] = {
        "convolution": _convolution,
        "ema": _ema,
        "models": _models,
        "tokens": _tokens,
    }
    settings = Settings(asked.device, 0.0 if asked.quick else asked.seconds, 3 if asked.quick else 12)
    for name in asked.only:
        try:
            for row in measures[name](asked, settings):
                costs = dataclasses.replace(costs, rows=(*costs.rows, row))
                yield costs
            continue
        except UnsupportedError as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"{OUT_OF_MEMORY} at sizes that leave nothing more to compare; ask for smaller ones"
        costs = dataclasses.replace(costs, left_out=(*costs.left_out, f"{name}: {reason}"))
        yield costs


def _sizes(asked: argparse.Namespace, field: str, usual: Sequence[int], quick: Sequence[int]) -> list[int]:
    given = getattr(asked, field)
    return list(given if given is not None else quick if asked.quick else usual)


def _size(asked: argparse.Namespace, field: str, usual: int, quick: int) -> int:
    given = getattr(asked, field)
    return int(given if given is not None else quick if asked.quick else usual)


def _convolution(asked: argparse.Namespace, settings: Settings) -> Iterator[Row]:
    from pareto_sequence.cost import convolutions

    lengths = _sizes(asked, "lengths", (1024, 4096, 16384, 65536), (64, 128))
    dilations = _sizes(asked, "dilations", (1, 12, 144), (1, 4))
    width = _size(asked, "width", 512, 8)
    return convolutions.measure(lengths, dilations, width, asked.kernel_size, settings, progress)


def _ema(asked: argparse.Namespace, settings: Settings) -> Iterator[Row]:
    from pareto_sequence.cost import averages

    lengths = _sizes(asked, "lengths", (1024, 4096, 16384), (64, 128))
    states = _sizes(asked, "states", (16, 60), (4,))
    return averages.measure(lengths, states, _size(asked, "width", 512, 8), settings, progress)


def _models(asked: argparse.Namespace, settings: Settings) -> Iterator[Row]:
    from pareto_sequence.cost import models

    lengths = _sizes(asked, "lengths", (1024, 2048, 4096, 8192, 16384), (64, 128))
    widths = _sizes(asked, "widths", (128, 256, 512), (16,))
    layers, chunk = _size(asked, "layers", 8, 2), _size(asked, "chunk", 1024, 32)
    shapes = [
        models.Shape(width, state, decoding, layers, chunk)
        for decoding, state in (FIGURES[figure] for figure in asked.figures)
        for width in widths
    ]
    return models.measure(lengths, shapes, settings, progress)


def _tokens(asked: argparse.Namespace, settings: Settings) -> Iterator[Row]:
    from pareto_sequence.cost import models

    lengths = _sizes(asked, "lengths", (4096, 8192, 16384, 32768, 65536), (64, 128, 256))
    layers, chunk = _size(asked, "layers", 2, 1), _size(asked, "chunk", 1024, 32)
    shape = models.Shape(_size(asked, "width", 256, 16), 16, True, layers, chunk)
    return models.measure_tokens(lengths, shape, settings, progress)


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
