"""The ``pareto`` command: arguments to specifications, progress on the terminal, exit codes.

Exit codes of ``bench``: 0 all results are ok (or unsupported here), 1 some failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pareto_runner.questions import chosen_questions, headline, infos, parse_seeds, question_paths, selected
from pareto_runner.terminal import Bars, console, errors, plan_table

if TYPE_CHECKING:
    from pareto_core import Result, RunSpec
    from pareto_runner.benchfile import Question
    from pareto_runner.journal import Journal

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

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
Fresh = Annotated[bool, typer.Option("--fresh", help="Run again what has a result already.")]
Limit = Annotated[float, typer.Option(min=0.01, help="Minutes of silence after which a process counts as hung.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, why, how long it took, and stop.")]
Out = Annotated[Path, typer.Option(help="Where journal, report and logs are written.")]
Benchmarks = Annotated[Path | None, typer.Option(help="Folder of benchmark files (default: found above here).")]
Tracking = Annotated[str | None, typer.Option(help="MLflow tracking URI (default: $MLFLOW_TRACKING_URI or sqlite).")]


def show_versions(asked: bool) -> None:
    """Print the version of each package of this project that is installed, and stop."""
    if not asked:
        return
    from importlib.metadata import distributions

    found = {item.name: item.version for item in distributions() if item.name.startswith("pareto-")}
    for name, version in sorted(found.items()):
        console.print(f"{name} {version}", highlight=False)
    raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=show_versions, is_eager=True, help="Print the packages' versions.")
]


@app.callback()
def pareto(version: Version = False) -> None:
    """Measure what efficiency techniques cost and what they buy: accuracy, memory and latency, side by side."""


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
    fresh: Fresh = False,
    dry_run: DryRun = False,
    limit: Limit = 60.0,
    out: Out = Path("results"),
    benchmarks: Benchmarks = None,
    tracking_uri: Tracking = None,
) -> None:
    """Run benchmarks, log them to MLflow and write the report.

    A result whose specification, code, lock, data and machine are the same stands and is not run again. What was cut
    short goes on: the same command continues trainings from their checkpoints.

    Examples:  pareto bench  |  pareto bench adapters/krona_vs_lora --profile full
    """
    from pareto_runner.benchfile import Choices

    choices = Choices(target, profile, parse_seeds(seeds), nproc, model, data, tuple(case or ()))
    questions = chosen_questions(names or [], benchmarks, all_questions)
    cases = [case for question in questions for case in selected(question, choices, only)]
    if dry_run:
        from pareto_runner.plan import Past

        past = Past(journal_of(out).entries())
        console.print(plan_table(past.plan([spec for _, specs in cases for spec in specs], fresh)))
        return
    results, interrupted = run_suite(cases, out, tracking_uri, fresh, 60 * limit)
    if results:
        from pareto_runner.report import terminal_table

        console.print(terminal_table(results))
    written = write_or_say(out, questions) if results else True
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        errors.print(f"failed: {result.spec.variant} (seed {result.spec.seed}): {result.reason}")
        if result.log:
            errors.print(result.log, style="dim")
    if interrupted:
        errors.print("interrupted: what is done is kept; the same command goes on from here")
    raise typer.Exit(130 if interrupted else 1 if failed or not written else 0)


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
        names = [name for name in discover.available(group) if not name.startswith(("selftest.", "faults."))]
        console.print(f"{label}: {', '.join(names) or 'none'}")


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

    if not journal_of(out).directory.is_dir():
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


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="A results folder, a journal folder, or a git commit of --out.")],
    after: Annotated[str, typer.Argument(help="The same, of what is new.")],
    out: Out = Path("results"),
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Compare latencies of different machines too, and say so.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a comment.")] = False,
) -> None:
    """Say what got better or worse between two journals or commits.

    Exit codes for CI: 0 nothing got worse, 1 something did, 2 nothing could be compared.
    """
    from pareto_runner import changes

    old, new = (changes.pick(name, journal_of(out)) for name in (before, after))
    found = changes.compare_journals(old, new, across_machines)
    if markdown:
        print(changes.markdown(found))
    else:
        console.print(changes.terminal_table(found))
    raise typer.Exit(changes.exit_code(found))


@app.command()
def upload(
    folders: Annotated[list[Path] | None, typer.Argument(help="Results folders (default: results).")] = None,
    tracking_uri: Tracking = None,
) -> None:
    """Bring results into MLflow that are not there yet, each once; exit code 1 where some could not be."""
    from pareto_core import ParetoError
    from pareto_runner.upload import upload_journal

    failed = False
    for folder in folders or [Path("results")]:
        journal = journal_of(folder)
        if not journal.directory.is_dir():
            raise ParetoError(f"no results in {folder}: name a folder that `pareto bench` wrote")
        with console.status(f"{folder}: looking") as status:
            done = upload_journal(journal.directory, tracking_uri, status.update)
        console.print(f"{folder}: {done}", soft_wrap=True)
        failed = failed or bool(done.failed)
    raise typer.Exit(1 if failed else 0)


@app.command()
def clean(out: Out = Path("results")) -> None:
    """Free the space of prepared models, checkpoints and logs; results, report and MLflow stay."""
    from pareto_runner.artifacts import clean as remove

    console.print(f"{out}: {remove(out) / 2**20:,.0f} MiB freed", soft_wrap=True)


@app.command()
def selftest(
    pairs: Annotated[int, typer.Option(min=0, help="A/A pairs: equal processes that must not differ.")] = 0,
    planted: Annotated[int, typer.Option(min=0, help="Planted slow-downs of 10 % that must be found.")] = 0,
    out: Out = Path("results/selftest"),
) -> None:
    """Check the instruments against workloads that know the truth; exit code 1 where one is off."""
    from pareto_runner.selftest import run as run_checks

    raise typer.Exit(0 if run_checks(out, pairs, planted, console) else 1)


def run_suite(
    cases: Sequence[tuple[str, Sequence[RunSpec]]], out: Path, tracking_uri: str | None, fresh: bool, limit: float
) -> tuple[list[Result], bool]:
    """Run everything under progress bars and log it to MLflow; returns the results, and whether it was cut short."""
    from pareto_runner import discover
    from pareto_runner.suite import Suite
    from pareto_runner.upload import Uploader

    specs = [spec for _, group in cases for spec in group]
    target = discover.make_target(specs[0].target)
    probe = target.probe()
    console.print(f"target {target.name}: {probe.reason}")
    interrupted = False
    with Uploader(tracking_uri, out / "logs") as uploader, Bars(len(specs)) as bars, interruptible():
        suite = Suite(out, bars, uploader.log, fresh, limit)
        try:
            uploader.suite(", ".join(name for name, _ in cases), {"target": target.name, "profile": specs[0].profile})
            suite.run(cases)
        except KeyboardInterrupt:
            interrupted = True
        failed = any(result.status == "failed" for result in suite.results)
        uploader.close("KILLED" if interrupted else "FAILED" if failed else "FINISHED")
    for result in suite.unstored:
        errors.print("this result could be stored nowhere, so here it is:")
        print(json.dumps(result.to_json()))
    if uploader.behind:
        errors.print(
            f"MLflow has not taken {len(uploader.behind)} results: {uploader.problem}\n"
            f"They are safe in {out}/journal; `pareto upload {out}` brings them in.",
            markup=False,
            soft_wrap=True,
        )
    return suite.results, interrupted


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let an end that is asked for by a signal be handled like Ctrl-C; a second signal ends at once."""

    def stop(number: int, _: Any) -> None:
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)
        raise KeyboardInterrupt

    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.signal(kind, stop) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def journal_of(out: Path) -> Journal:
    """The journal of a results folder."""
    from pareto_runner.journal import Journal

    return Journal(out / "journal")


def write(out: Path, questions: Sequence[Question]) -> Path:
    """Write the report over the newest results of the journal."""
    from pareto_runner.journal import latest
    from pareto_runner.report import write_report

    entries, damaged = journal_of(out).scan()
    for item in damaged:
        errors.print(f"left out: {item.path} is {item.reason}", soft_wrap=True)
    about = {name: info for question in questions for name, info in infos(question).items()}
    return write_report(latest(entry.result for entry in entries), about, out, damaged)


def write_or_say(out: Path, questions: Sequence[Question]) -> bool:
    """Write the report and say where it is, or why there is none; returns whether there is."""
    from pareto_core import ParetoError

    try:
        path = write(out, questions)
    except ParetoError as error:
        errors.print(f"error: {error}", style="red", soft_wrap=True)
        return False
    console.print(f"Report: {path}\nCompare the runs: pareto ui", soft_wrap=True)
    return True


def main() -> None:
    """Run the command; what a user can mend is one message and exit code 2, never a traceback."""
    from pareto_core import ParetoError

    try:
        app()
    except ParetoError as error:
        errors.print(f"error: {error}", style="red", soft_wrap=True)
        if log := getattr(error, "log", ""):  # the last words of a process that failed
            errors.print(log, style="dim", soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
