"""``python -m pareto_runner.faults``: break suites in every way, some two hundred times, and count the damage.

After each fault the same suite runs again, undisturbed, and must end well. Then every result that was ever in the
journal must still be there (lost), the store must hold each exactly once, finished (duplicated), every command must
have ended by itself (wedged), and a fault that fails a run must have left a row whose reason says so (unclear).
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pareto_core.cache import write_json
from pareto_runner.faults.stage import Stage, identity
from pareto_runner.faults.trials import TRIALS
from pareto_runner.tracking import create_sqlite


@dataclasses.dataclass
class Outcome:
    """What one trial left: counts of damage, the reasons of its failed rows, and what was wrong, for a person."""

    kind: str
    number: int
    lost: int = 0
    duplicated: int = 0
    wedged: int = 0
    unclear: int = 0
    reasons: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    skipped: str = ""
    seconds: float = 0.0

    @property
    def damaged(self) -> bool:
        """Whether anything went wrong."""
        return bool(self.problems or self.lost or self.duplicated or self.wedged or self.unclear)


def run_trial(kind: str, number: int, folder: Path, cpu: int, template: Path) -> Outcome:
    """Break a suite, let it recover, and count."""
    trial, _, row = TRIALS[kind]
    stage = Stage(folder, cpu, None if number % 5 == 4 else template)
    rng = random.Random(f"{kind} {number}")
    outcome = Outcome(kind, number)
    start = time.monotonic()
    problems: list[str] = []
    seen: set[str] = set()
    try:
        for ended in trial(stage, rng, number):
            outcome.wedged += ended.code is None
            if ended.code not in (0, 1, 2, 130, -9, -15, -2):
                problems.append(f"exit code {ended.code}: {ended.output[-800:]}")
            if "Traceback" in ended.output and not row:
                problems.append(f"a traceback: {ended.output[-1500:]}")
            seen |= {result_of(path) for path in files(stage)}
    except PermissionError as error:
        return dataclasses.replace(outcome, skipped=str(error))
    failed = [result for result in stage.results() if result.status == "failed"]
    outcome.reasons = tuple(result.reason for result in failed)
    if row and not any(re.search(row, reason) for reason in outcome.reasons):
        outcome.unclear += 1
        problems.append(f"no row says {row!r}: {outcome.reasons}")
    outcome.unclear += sum(not reason.strip() for reason in outcome.reasons)
    stage.fault.unlink(missing_ok=True)
    ended = stage.run(*(argument for argument in stage.arguments if argument != "--fresh"))
    outcome.wedged += ended.code is None
    if ended.code != 0:
        problems.append(f"the undisturbed run ended with {ended.code}: {ended.output[-1500:]}")
    now = [result_of(path) for path in files(stage)]
    destroyed = 1 if kind == "journal file cut off" else 0
    outcome.lost = max(0, len(seen - set(now)) - destroyed)
    outcome.duplicated = len(now) - len(set(now))
    runs = stage.runs()
    for path in files(stage):
        statuses = runs.get(identity(path), [])
        outcome.lost += not statuses
        outcome.duplicated += max(0, len(statuses) - 1)
        if statuses and "RUNNING" in statuses:
            problems.append(f"{path.name} is unfinished in the store")
            outcome.lost += 1
    outcome.problems, outcome.seconds = tuple(problems), time.monotonic() - start
    return outcome


def files(stage: Stage) -> list[Path]:
    """Files of every readable result in a trial's folder."""
    return [entry.path for entry in stage.entries()]


def result_of(path: Path) -> str:
    """A result by its content, wherever its file has been moved."""
    return identity(path)


def markdown(outcomes: list[Outcome]) -> str:
    """The table for the docs."""
    by_kind: dict[str, list[Outcome]] = {kind: [] for kind in TRIALS}
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome)
    lines = [
        "| fault | times | lost | duplicated | wedged | unclear | what the row says |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for kind, found in by_kind.items():
        if not found:
            continue
        done = [item for item in found if not item.skipped]
        words = collections.Counter(reason.splitlines()[0][:80] for item in done for reason in item.reasons)
        said = words.most_common(1)[0][0] if words else "no row: nothing failed, or the run was cut short"
        if found and not done:
            said = f"not possible here: {found[0].skipped}"
        counts = [sum(getattr(item, name) for item in done) for name in ("lost", "duplicated", "wedged", "unclear")]
        lines.append(f"| {kind} | {len(done)} | {' | '.join(map(str, counts))} | {said} |")
    done = [item for item in outcomes if not item.skipped]
    totals = [sum(getattr(item, name) for item in done) for name in ("lost", "duplicated", "wedged", "unclear")]
    lines.append(f"| **all** | **{len(done)}** | {' | '.join(f'**{total}**' for total in totals)} | |")
    return "\n".join(lines)


def chosen(count: int, only: str) -> list[tuple[str, int]]:
    """Kinds and numbers of ``count`` trials in the kinds' proportions, each kind at least once, mixed."""
    kinds = {kind: share for kind, (_, share, _) in TRIALS.items() if only in kind}
    whole = sum(kinds.values())
    trials = [(kind, n) for kind, share in kinds.items() for n in range(max(1, round(count * share / whole)))]
    random.Random(0).shuffle(trials)
    return trials


def recorded(path: Path) -> list[Outcome]:
    """The outcomes of an earlier run, none where there was none."""
    return [Outcome(**item) for item in json.loads(path.read_text())] if path.exists() else []


def show(outcomes: Sequence[Outcome], total: int, console: Console) -> None:
    """Print the last outcome: whole where something went wrong, else a line where there is no progress bar."""
    outcome = outcomes[-1]
    if outcome.damaged:
        console.print(json.dumps(dataclasses.asdict(outcome), indent=1), markup=False, style="red")
    elif not console.is_terminal:
        console.print(f"{len(outcomes)}/{total} {outcome.kind}: fine ({outcome.seconds:.0f} s)")


def main() -> int:
    """Run the trials, one per CPU at a time, and print the table; exit code 1 where anything was damaged.

    Those whose outcomes are in the folder already are not repeated, so that a long run can be cut short and go on.
    """
    parser = argparse.ArgumentParser(prog="python -m pareto_runner.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=220, help="how many faults, in fixed proportions (default: 220)")
    parser.add_argument("--only", default="", help="only the kinds whose name contains this")
    parser.add_argument(
        "--out", type=Path, default=Path("results/faults"), help="where outcomes are kept; a run goes on from those"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folders of trials that went wrong")
    arguments = parser.parse_args()
    console = Console()
    trials = chosen(arguments.count, arguments.only)
    cpus: queue.SimpleQueue[int] = queue.SimpleQueue()
    for cpu in os.sched_getaffinity(0):
        cpus.put(cpu)
    outcomes = recorded(arguments.out / "faults.json")
    arguments.out.mkdir(parents=True, exist_ok=True)
    template = arguments.out / "template.db"
    if not template.exists():
        create_sqlite(template.absolute())

    def one(kind: str, number: int) -> Outcome:
        cpu = cpus.get()
        folder = Path(tempfile.mkdtemp(prefix="pareto-fault-"))
        try:
            outcome = run_trial(kind, number, folder, cpu, template)
        finally:
            cpus.put(cpu)
        if arguments.keep and outcome.problems:
            console.print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return outcome

    with Progress(console=console) as progress, concurrent.futures.ThreadPoolExecutor(cpus.qsize()) as pool:
        bar = progress.add_task("faults", total=len(trials))
        past = {(outcome.kind, outcome.number) for outcome in outcomes}
        progress.advance(bar, len(past))
        running = [pool.submit(one, *trial) for trial in trials if trial not in past]
        with contextlib.suppress(KeyboardInterrupt):  # the table is then made of what is done
            for done in concurrent.futures.as_completed(running):
                outcomes.append(done.result())
                progress.advance(bar)
                show(outcomes, len(trials), progress.console)
                write_json(arguments.out / "faults.json", [dataclasses.asdict(item) for item in outcomes])
        pool.shutdown(cancel_futures=True)
    table = markdown(outcomes)
    (arguments.out / "faults.md").write_text(table + "\n")
    print(table)
    return 1 if any(item.damaged for item in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
