"""Which questions a command means: names, folders and files, and what the report says about them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pareto_core import RunSpec
    from pareto_runner.benchfile import Choices, Question


#: more seeds than anybody runs; a larger count is a mistake
MANY = 1001


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """Read ``--seeds``: a count, or a list with commas."""
    from pareto_core import ConfigError

    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.removesuffix(",").split(","))
    except ValueError:
        numbers = ()
    chosen = numbers if "," in text or not numbers else tuple(range(min(numbers[0], MANY)))
    if not 0 < len(chosen) < MANY or min(chosen) < 0 or len(set(chosen)) != len(chosen):
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
    from pareto_runner.tomlfile import BenchmarkFileError, load

    try:
        values = load(path)
    except BenchmarkFileError as error:
        return str(error).removeprefix(f"{path}: "), []
    title, profiles = values.get("title"), values.get("profiles")
    return title if isinstance(title, str) else "", sorted(profiles) if isinstance(profiles, dict) else []


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
