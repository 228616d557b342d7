"""The results as Markdown for people and JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pareto_sequence.cost.turns import DIRECTIONS, Estimate, Row

TITLES = {
    "convolution": "Depthwise dilated convolution",
    "ema": "Damped moving average",
    "models": "TCNCA beside MEGA-chunk",
    "tokens": "Time per token",
}
TEXTS = {
    "convolution": "One sequence, left-padded. Ratio: how many times faster than torch's convolution.",
    "ema": "One sequence, newly initialised parameters. Ratio: how many times faster than by FFT.",
    "models": (
        "One sequence. Ratio: how many times faster than MEGA-chunk as published (kernel computed in each pass, FFT). "
        "Bound: the same ratio for the blocks without their mixer, which no mixer can pass; the share is how much of "
        "the bound is reached. Algorithms of a model were compared before: outputs at `checked` positions, gradients "
        "at 4,096 at most."
    ),
    "tokens": (
        "One sequence. Ratio: time per token to that at the shortest length; 1 is linear scaling. Algorithms of a "
        "model were compared before: outputs at `checked` positions, gradients at the shortest length, 4,096 at most."
    ),
}


@dataclasses.dataclass(frozen=True)
class Costs:
    """All that one run measured; ``left_out`` says what was not, and why."""

    machine: dict[str, Any]
    rows: tuple[Row, ...] = ()
    left_out: tuple[str, ...] = ()

    def tables(self) -> list[str]:
        """Names of the tables that have rows, in the order of the titles."""
        return [name for name in TITLES if any(row.table == name for row in self.rows)]

    def of(self, table: str) -> list[Row]:
        """Rows of one table."""
        return [row for row in self.rows if row.table == table]


def machine(device: str, malloc: str) -> dict[str, Any]:
    """What the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "threads": torch.get_num_threads(),
        "malloc": malloc,
        "torch": torch.__version__,
    }


def write(costs: Costs, directory: Path) -> list[Path]:
    """Write ``cost.md`` and ``cost.json`` into ``directory``; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {"cost.md": markdown(costs), "cost.json": json.dumps(dataclasses.asdict(costs), indent=1) + "\n"}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def markdown(costs: Costs) -> str:
    """Every table; intervals are 95 %."""
    about = ", ".join(f"{key} {value}" for key, value in costs.machine.items() if key != "device")
    parts = [
        "# What sequence models cost",
        f"{costs.machine['device']} ({about}). Brackets: 95 % intervals over turns.",
    ]
    for name in costs.tables():
        parts += [f"## {TITLES[name]}", TEXTS[name]]
        for direction in DIRECTIONS:
            rows = [row for row in costs.of(name) if row.direction == direction]
            parts += [f"### {direction.capitalize()}", _rows_table(rows)]
    if costs.left_out:
        parts += ["## Left out", "\n".join(f"- {reason}" for reason in costs.left_out)]
    return "\n\n".join(parts) + "\n"


def _rows_table(rows: Sequence[Row]) -> str:
    places = list(dict.fromkeys(key for row in rows for key in row.place))
    bounded = any(row.bound is not None for row in rows)
    columns = [*places, "case", "ms", "ratio", *(["bound", "share of it"] if bounded else [])]
    lines = []
    for row in rows:
        line = [str(row.place.get(key, "")) for key in places] + [row.case]
        line += [row.problem or _shown(row.milliseconds, 3), _shown(row.ratio, 2)]
        if bounded:
            line += [_shown(row.bound, 2), _share(row)]
        lines.append(line)
    return _table(columns, len(places) + 1, lines)


def _share(row: Row) -> str:
    if row.bound is None or row.ratio is None:
        return ""
    return f"{100 * row.ratio.value / row.bound.value:.0f} %"


def _table(columns: Sequence[str], texts: int, rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * texts + ["---:"] * (len(columns) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, rule, *rows])


def _shown(figure: Estimate | None, digits: int) -> str:
    if figure is None:
        return ""
    value, low, high = (f"{number:.{digits}f}" for number in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"
