"""Checks of the instruments, on workloads whose own clocks and counters know the truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def run(directory: Path, pairs: int, planted: int, console: Console) -> bool:
    """Check the instruments; with ``pairs`` or ``planted``, experiment on the verdicts instead. True if all is well.

    Tables go to ``console``; ``checks.json``, ``pairs.jsonl`` and ``summary.json`` to ``directory``. An experiment that
    was interrupted goes on from where it was.
    """
    from pareto_core.cache import write_json
    from pareto_runner.selftest import checks, experiment

    if not pairs and not planted:
        found = checks.run_checks(directory / "checks", notify=console.print)
        write_json(directory / "checks.json", [check.to_json() for check in found])
        console.print(checks.terminal_table(found))
        return all(check.ok for check in found)

    def show(pair: experiment.Pair) -> None:
        mark, style = ("✓", "green") if pair.right else ("✗", "red")
        interval = f"×{pair.ratio:.4f}, {pair.low:.4f} to {pair.high:.4f}"
        cost = f"margin {pair.margin:.1%}, {pair.seconds:.0f} s"
        console.print(f"{mark} {pair.kind}: {pair.verdict}, {interval}, {cost}", style=style)

    summary = experiment.run(directory / "pairs", pairs, planted, on_pair=show)
    write_json(directory / "summary.json", summary.to_json())
    console.print(str(summary))
    return summary.ok
