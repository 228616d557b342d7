"""What a suite shows on the terminal: progress bars, and the plan of a dry run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pareto_core import Result, RunSpec
    from pareto_runner.plan import Planned

# titles and names come from files: what looks like markup in them is text
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)


def plan_table(planned: Iterable[Planned]) -> Table:
    """What would run and what stands, why, and how long it took the last time."""
    table = Table("question", "variant", "stages", "seed", "task", "engine", "training", "runs", "why", "last time")
    for item in planned:
        spec = item.spec
        stages = " → ".join("+".join(method.name for method in stage.methods) for stage in spec.stages)
        training = spec.stages[0].training
        budget = training.budget
        amount = f"{budget.max_steps} steps" if budget.max_steps else f"{budget.epochs:g} epochs"
        engine = f"{spec.engine.name}, ZeRO {spec.engine.zero_stage}, {spec.engine.precision}"
        how = f"{amount}, batch {training.batch_size}, rate {training.learning_rate:g}"
        runs = "no" if item.standing else "yes"
        names = (spec.question, spec.variant, stages, str(spec.seed), spec.task.name)
        table.add_row(*names, engine, how, runs, item.why, duration(item.seconds))
    return table


def duration(seconds: float | None) -> str:
    """``45 s``, ``12 min``, ``3.1 h``; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Bars:
    """Two progress bars: the suite, and the run that is going on. Implements suite.Watcher."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress: Progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._suite: TaskID = self._progress.add_task("suite", total=total)
        self._run: TaskID = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, spec: RunSpec) -> None:
        """Show the variant that is prepared."""
        self._label = f"{spec.variant} · seed {spec.seed}"
        self._progress.update(self._run, description=f"{self._label}: loading", total=None, completed=0)

    def step(self, step: int, steps: int, loss: float) -> None:
        """Show a training step."""
        text = f"{self._label}: training, loss {loss:.3f}"
        self._progress.update(self._run, description=text, total=steps, completed=step)
        if not console.is_terminal and (step == steps or step % max(1, steps // 4) == 0):
            console.print(f"{text} ({step}/{steps})")

    def note(self, text: str) -> None:
        """Show what else is going on."""
        self._progress.update(self._run, description=text, total=None, completed=0)
        if not console.is_terminal:
            console.print(text)

    def end(self, result: Result, reused: bool) -> None:
        """Count a result."""
        self._progress.advance(self._suite)
        spec = result.spec
        how = "unchanged, not run again" if reused else result.status
        self._progress.console.print(f"{how}: {spec.question} · {spec.variant} · seed {spec.seed}")
