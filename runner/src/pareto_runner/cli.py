"""The ``pareto`` command: arguments to specifications, progress on the terminal, exit codes.

Exit codes: 0 all results are ok (or unsupported here), 1 some failed, 2 bad input.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pareto_core import Result, RunSpec
    from pareto_runner.benchfile import Choices, Question

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure what efficiency techniques cost and what they buy: accuracy, memory and latency, side by side.",
)
console = Console()
errors = Console(stderr=True)

Names = Annotated[
    list[str] | None,
    typer.Argument(help="Questions such as adapters/krona_vs_lora, or paths of TOML files. None: one per package."),
]
Target = Annotated[str, typer.Option(help="Hardware: xeon, gpu or tpu (see `pareto targets`).")]
Profile = Annotated[str, typer.Option(help="How much to run; every file has smoke and full (see `pareto list`).")]
Seeds = Annotated[
    str | None, typer.Option(help="Seeds to run instead of the profile's: 3 means 0,1,2; or 0,7,42; or 7, for one.")
]
Only = Annotated[str | None, typer.Option(help="Run the variants whose name contains this, or matches it (*, ?).")]
Cases = Annotated[
    list[str] | None, typer.Option("--case", help="Run these cases of a profile that has several (repeatable).")
]
Nproc = Annotated[int, typer.Option(min=1, help="Training processes, started by DeepSpeed's launcher.")]
Model = Annotated[str | None, typer.Option(help="Backbone instead of the task's: a hub name or a directory.")]
Data = Annotated[str | None, typer.Option(help="Directory with the task's data.")]
Out = Annotated[Path, typer.Option(help="Where journal, report and logs are written.")]
Benchmarks = Annotated[Path | None, typer.Option(help="Folder of benchmark files (default: found above here).")]
Tracking = Annotated[str | None, typer.Option(help="MLflow tracking URI (default: $MLFLOW_TRACKING_URI or sqlite).")]


@app.command()
def bench(
    names: Names = None,
    target: Target = "xeon",
    profile: Profile = "smoke",
    seeds: Seeds = None,
    only: Only = None,
    case: Cases = None,
    nproc: Nproc = 1,
    model: Model = None,
    data: Data = None,
    all_questions: Annotated[bool, typer.Option("--all", help="Every question, not one per package.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")] = False,
    out: Out = Path("results"),
    benchmarks: Benchmarks = None,
    tracking_uri: Tracking = None,
) -> None:
    """Run benchmarks, log them to MLflow and write the report.

    Examples:  pareto bench  |  pareto bench adapters/krona_vs_lora --profile full
    """
    from pareto_runner.benchfile import Choices

    choices = Choices(target, profile, parse_seeds(seeds), nproc, model, data, tuple(case or ()))
    questions = chosen_questions(names or [], benchmarks, all_questions)
    cases = [case for question in questions for case in selected(question, choices, only)]
    if dry_run:
        console.print(plan(cases))
        return
    read_journal(out)  # a file that cannot be read is told now, not after hours
    results = run_suite(cases, out, tracking_uri)
    if results:
        from pareto_runner.report import terminal_table

        console.print(terminal_table(results))
        report_path = write(out, questions)
        console.print(f"Report: {report_path}\nCompare the runs: [bold]pareto ui[/]")
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        errors.print(f"failed: {result.spec.variant} (seed {result.spec.seed}): {result.reason}", markup=False)
    raise typer.Exit(1 if failed else 0)


@app.command("list")
def list_questions(benchmarks: Benchmarks = None) -> None:
    """List the questions, methods and tasks that are here."""
    from pareto_runner import discover

    table = Table("question", "title", "profiles")
    for path in question_paths(benchmarks):
        title, profiles = headline(path)
        table.add_row(f"{path.parent.name}/{path.stem}", title, ", ".join(profiles))
    console.print(table)
    for group, label in ((discover.METHODS, "methods"), (discover.TASKS, "tasks")):
        console.print(f"{label}: {', '.join(discover.available(group)) or 'none'}")


@app.command()
def targets() -> None:
    """Say which hardware is here, and why the rest is not."""
    from pareto_runner import discover

    table = Table("target", "here", "what was found")
    for name in discover.TARGETS:
        probe = discover.make_target(name).probe()
        table.add_row(name, "yes" if probe.available else "no", probe.reason)
    console.print(table)


@app.command()
def report(out: Out = Path("results"), benchmarks: Benchmarks = None) -> None:
    """Write the report again from the journal."""
    from pareto_core import ParetoError

    if not (out / "journal").is_dir():
        raise ParetoError(f"no results in {out}: run `pareto bench` first, or say where they are with --out")
    questions = chosen_questions([], benchmarks, all_questions=True)
    console.print(f"Report: {write(out, questions)}")


@app.command()
def ui(
    tracking_uri: Tracking = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
) -> None:
    """Open MLflow's UI on the store of the runs (on this machine only, 127.0.0.1)."""
    from pareto_core import ParetoError
    from pareto_runner.tracking import find_experiment, ui_command, ui_page

    experiment = find_experiment(tracking_uri)
    if experiment is None:
        raise ParetoError("no runs in this store: run `pareto bench` first, or name the store with --tracking-uri")
    command = ui_command(tracking_uri, port)
    console.print(f"MLflow on http://127.0.0.1:{port}{ui_page(experiment)} (Ctrl-C ends it)", soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt):
        raise typer.Exit(subprocess.run(command, check=False).returncode)


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """Read ``--seeds``: a count, or a list with commas."""
    from pareto_core import ConfigError

    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.removesuffix(",").split(","))
    except ValueError:
        numbers = ()
    chosen = numbers if "," in text or not numbers else tuple(range(numbers[0]))
    if not chosen or min(chosen) < 0 or len(set(chosen)) != len(chosen):
        raise ConfigError("command line", "--seeds", text, "give a count (3) or distinct seeds (0,7,42; one: 7,)")
    return chosen


def benchmarks_folder(given: Path | None) -> Path:
    """Return the folder of benchmark files: the given one, or ``benchmarks`` here or in a folder above."""
    from pareto_core import ParetoError

    if given is not None:
        if not given.is_dir():
            raise ParetoError(f"--benchmarks: {given} is not a folder")
        return given
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "benchmarks").is_dir() and (folder / "runner").is_dir():
            return folder / "benchmarks"
    raise ParetoError("no folder of benchmarks above here: run this in a clone of Pareto, or give --benchmarks DIR")


def question_paths(benchmarks: Path | None) -> list[Path]:
    """Paths of all benchmark files."""
    return sorted(benchmarks_folder(benchmarks).glob("*/*.toml"))


def headline(path: Path) -> tuple[str, list[str]]:
    """Title and profiles of a file, read without checking the rest."""
    import tomllib

    try:
        values = tomllib.loads(path.read_text())
        return str(values.get("title", "")), sorted(values.get("profiles", {}))
    except (tomllib.TOMLDecodeError, OSError, TypeError, UnicodeDecodeError) as error:
        return f"cannot be read: {error}", []


def chosen_questions(names: Sequence[str], benchmarks: Path | None, all_questions: bool) -> list[Question]:
    """Read the named files; without names the flagships, or all."""
    from pareto_core import ParetoError, UnknownNameError
    from pareto_runner import benchfile

    if not names:
        found = [benchfile.read(path) for path in question_paths(benchmarks)]
        return [question for question in found if all_questions or question.content.flagship]
    questions = []
    for name in names:
        if name.endswith(".toml"):
            questions.append(benchfile.read(Path(name)))
            continue
        known = {f"{path.parent.name}/{path.stem}": path for path in question_paths(benchmarks)}
        if name not in known:
            raise UnknownNameError("question", name, known)
        questions.append(benchfile.read(known[name]))
    if not questions:
        raise ParetoError("no questions to run")
    return questions


def selected(question: Question, choices: Choices, only: str | None) -> Iterator[tuple[str, list[RunSpec]]]:
    """Yield the cases of a question with the variants that ``only`` keeps."""
    from pareto_core import UnknownNameError
    from pareto_runner.benchfile import cases

    for name, specs in cases(question, choices):
        kept = [spec for spec in specs if only is None or matches(only, spec.variant)]
        if not kept:
            raise UnknownNameError("variant", only, {spec.variant for spec in specs})
        yield name, kept


def matches(pattern: str, variant: str) -> bool:
    """Whether a variant's name contains the pattern, or matches it as a whole; case does not matter."""
    low = variant.lower()
    return pattern.lower() in low or fnmatch.fnmatchcase(low, pattern.lower())


def plan(cases: Sequence[tuple[str, Sequence[RunSpec]]]) -> Table:
    """What would run."""
    table = Table("question", "variant", "stages", "seed", "task", "engine", "training")
    for name, specs in cases:
        for spec in specs:
            stages = " → ".join("+".join(method.name for method in stage.methods) for stage in spec.stages)
            training = spec.stages[0].training
            budget = training.budget
            amount = f"{budget.max_steps} steps" if budget.max_steps else f"{budget.epochs:g} epochs"
            engine = f"{spec.engine.name}, ZeRO {spec.engine.zero_stage}, {spec.engine.precision}"
            how = f"{amount}, batch {training.batch_size}, rate {training.learning_rate:g}"
            table.add_row(name, spec.variant, stages, str(spec.seed), spec.task.name, engine, how)
    return table


def run_suite(cases: Sequence[tuple[str, Sequence[RunSpec]]], out: Path, tracking_uri: str | None) -> list[Result]:
    """Build what DeepSpeed needs, then run everything under progress bars and log each result to MLflow."""
    from pareto_runner import discover
    from pareto_runner.suite import Suite, build_deepspeed_op
    from pareto_runner.tracking import Tracker

    specs = [spec for _, group in cases for spec in group]
    target = discover.make_target(specs[0].target)
    probe = target.probe()
    console.print(f"target {target.name}: {probe.reason}")
    if probe.available and target.deepspeed_accelerator and any(s.engine.name == "deepspeed" for s in specs):
        with console.status("DeepSpeed starts (the first time it compiles a C++ extension: up to two minutes)"):
            seconds = build_deepspeed_op(out, target.deepspeed_accelerator)
        console.print(f"DeepSpeed is ready ({seconds:.0f} s)")
    names = ", ".join(name for name, _ in cases)
    with Tracker(tracking_uri) as tracker, Bars(len(specs)) as bars:
        tracker.suite(names, {"target": target.name, "profile": specs[0].profile})
        return Suite(out, bars, tracker.log).run(cases)


def read_journal(out: Path) -> list[Result]:
    """Read the results under ``out``; raises ParetoError naming a file that is not one, and what to do."""
    from pareto_core import ParetoError
    from pareto_runner.journal import Journal

    try:
        return Journal(out / "journal").read()
    except ParetoError as error:
        raise ParetoError(f"{error}; move it away, or choose another folder with --out") from error


def write(out: Path, questions: Sequence[Question]) -> Path:
    """Write the report over the newest results of the journal."""
    from pareto_runner.journal import latest
    from pareto_runner.report import write_report

    results = latest(read_journal(out))
    return write_report(results, {name: info for q in questions for name, info in infos(q).items()}, out)


def infos(question: Question) -> dict[str, object]:
    """What the report says about a question, for itself and each case of its profiles."""
    from pareto_runner.sections import QuestionInfo, Reference

    content = question.content
    references = tuple(
        Reference(r.table, r.caption, tuple(r.columns), {k: tuple(v) for k, v in r.rows.items()}, r.note)
        for r in content.references
    )
    ours = {row: variant for reference in content.references for row, variant in reference.ours.items()}
    names = [question.name]
    names += [f"{question.name}/{case.name}" for profile in content.profiles.values() for case in profile.cases]
    return {
        name: QuestionInfo(
            name=name,
            title=content.title,
            text=content.text,
            baseline=content.baseline,
            references=references,
            ours=ours,
        )
        for name in names
    }


class Bars:
    """Two progress bars: the suite, and the run that is going on. Implements suite.Watcher."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress: Progress = Progress(
            TextColumn("{task.description}"),
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

    def end(self, result: Result) -> None:
        """Count a result."""
        self._progress.advance(self._suite)
        spec = result.spec
        self._progress.console.print(
            f"{result.status}: {spec.question} · {spec.variant} · seed {spec.seed}", markup=False
        )


def main() -> None:
    """Run the command; what a user can mend is one message and exit code 2, never a traceback."""
    from pareto_core import ParetoError

    try:
        app()
    except ParetoError as error:
        errors.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
