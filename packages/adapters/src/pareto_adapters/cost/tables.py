"""The results as Markdown, CSV (one figure a line) and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pareto_adapters.cost.layers import FROZEN, KRON, TOKENS, Width
from pareto_adapters.cost.models import Latency, Memory
from pareto_adapters.cost.timing import Estimate


@dataclasses.dataclass(frozen=True)
class Costs:
    """All that one run measured; ``left_out`` says what was not, and why."""

    machine: dict[str, Any]
    widths: tuple[Width, ...] = ()
    latencies: tuple[Latency, ...] = ()
    memories: tuple[Memory, ...] = ()
    left_out: tuple[str, ...] = ()


def machine(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(costs: Costs, directory: Path) -> list[Path]:
    """Write ``cost.md``, ``cost.csv`` and ``cost.json`` into ``directory``; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        "cost.md": markdown(costs),
        "cost.csv": figures(costs),
        "cost.json": json.dumps(dataclasses.asdict(costs), indent=1) + "\n",
    }
    for name, text in texts.items():
        (directory / name).write_text(text)
    return [directory / name for name in texts]


def markdown(costs: Costs) -> str:
    """Everything as tables for people; intervals are 95 %."""
    about = ", ".join(f"{key} {value}" for key, value in costs.machine.items() if key != "device")
    parts = ["# What tuners cost", f"{costs.machine['device']} ({about}). Brackets are 95 % intervals over turns."]
    for width in costs.widths:
        parts += [f"## One layer of width {width.width}", _layer_text(width), _layer_table(width)]
    for model in dict.fromkeys(latency.model for latency in costs.latencies):
        rows = [latency for latency in costs.latencies if latency.model == model]
        parts += [f"## Latency of {model}", _LATENCY_TEXT, _latency_table(rows)]
    if costs.memories:
        parts += ["## Peak memory of training T5-base", _memory_table(costs.memories)]
    if costs.left_out:
        parts += ["## Left out", "\n".join(f"- {reason}" for reason in costs.left_out)]
    return "\n\n".join(parts) + "\n"


def figures(costs: Costs) -> str:
    """Every figure in a line of CSV: table, model or width, case, quantity, value, low, high."""
    found: list[tuple[Any, ...]] = []
    for width in costs.widths:
        found.append(("layer", width.width, KRON, "speedup_over_formed", *_numbers(width.speedup)))
        for row in width.rows:
            place = ("layer", width.width, row.case)
            found.append((*place, "parameters", row.parameters, "", ""))
            found.append((*place, "multiplications_per_token", row.multiplications, "", ""))
            found.append((*place, "milliseconds", *_numbers(row.milliseconds)))
            found.append((*place, "ratio", *_numbers(row.ratio)))
    for latency in costs.latencies:
        place = ("latency", latency.model, latency.case)
        found.append((*place, "milliseconds", *_numbers(latency.milliseconds)))
        found.append((*place, "ratio", *_numbers(latency.ratio)))
    for memory in costs.memories:
        place = ("memory", "t5-base", memory.case)
        found.append((*place, "parameters", memory.parameters, "", ""))
        found.append((*place, "peak_memory_bytes", memory.peak_memory_bytes, "", ""))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "size", "case", "quantity", "value", "low", "high"])
    writer.writerows(found)
    return text.getvalue()


_LATENCY_TEXT = (
    "One pass over ten random tokens, batch 1: 150 passes to warm up, three times 200 timed ones, taken in turns of "
    "ten. The paper's column is table 4.6's (T5-base, V100)."
)


def _layer_text(width: Width) -> str:
    m1, n1 = width.a_shape
    return (
        f"{TOKENS} tokens, forward and backward with the input's gradient. A is ({m1}, {n1}). Per token the frozen "
        f"layer multiplies {width.width**2:,} times and the factorised Kronecker product {_count(width, KRON):,} "
        f"times, as often as LoRA of rank {width.equal_rank} (√d is {width.width**0.5:.1f}) does. Forming the product "
        f"first costs {_shown(width.speedup, '{:.1f}')} times as much above the frozen layer."
    )


def _count(width: Width, case: str) -> int:
    return next(row.multiplications for row in width.rows if row.case == case)


def _layer_table(width: Width) -> str:
    rows = []
    for row in width.rows:
        above = Estimate(*(100 * (value - 1) for value in _numbers(row.ratio)))
        rows.append(
            (
                row.case,
                f"{row.parameters:,}",
                f"{row.multiplications:,}",
                _shown(row.milliseconds, "{:.2f}"),
                "" if row.case == FROZEN else _shown(above, "{:+.1f}"),
            )
        )
    return _table(["case", "trained", "more multiplications per token", "ms", "above the frozen layer, %"], rows)


def _latency_table(latencies: Iterable[Latency]) -> str:
    rows = [
        (
            latency.case,
            _shown(latency.milliseconds, "{:.2f}"),
            _shown(latency.ratio, "{:.3f}"),
            "" if latency.paper_percent is None else f"{latency.paper_percent / 100:.2f}",
        )
        for latency in latencies
    ]
    return _table(["case", "ms", "ratio to the base", "paper"], rows)


def _memory_table(memories: Iterable[Memory]) -> str:
    rows = [(m.case, f"{m.parameters:,}", f"{m.peak_memory_bytes / 2**20:.0f}") for m in memories]
    return _table(["case", "trained", "peak, MiB"], rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(figure: Estimate, form: str) -> str:
    value, low, high = (form.format(number) for number in _numbers(figure))
    return f"{value} [{low}, {high}]"


def _numbers(figure: Estimate) -> tuple[float, float, float]:
    return figure.value, figure.low, figure.high
