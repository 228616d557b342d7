"""What became better or worse between two journals or two commits, with an exit code for CI.

The two sides were measured at different times, so nothing here was taken in turns but the ratios to the baseline:

- a score: the difference over the same test items and seeds, with the paired interval of compare.py;
- a time against the baseline: the ratio of the two sides' ratios, each of which was taken in turns. What slows a whole
  session down cancels; a change of the baseline itself does too;
- a time as it stands: the ratio of the medians. Sessions lie apart without any change, so a verdict needs two seeds or
  more on each side, and an interval beyond :data:`SESSIONS_APART`;
- peaks of memory: the ratio of the medians, bounded by the seeds' extremes, beyond :data:`PEAKS_APART`;
- weights and parameters: as they are, for they are counted.

Times and peaks of different machines are compared only where that is asked for, and then the rows say so.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core import DataError, ParetoError, Result
from pareto_core.errors import UnknownNameError
from pareto_core.result import Verdict
from pareto_runner.plots import clean
from pareto_runner.sections import LARGEST, combine_ratio, fingerprint, has_score, machine_line
from pareto_runner.wording import difference, escape_markdown, margin, number, ratio, words

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from pareto_core import Comparison
    from pareto_runner.journal import Journal

#: medians of one variant have differed by a sixth between sessions of unchanged code, and by more on a loaded machine
SESSIONS_APART = 0.20
#: peaks of one variant's training have differed by a tenth between its seeds
PEAKS_APART = 0.10
#: a peak is known to so many MiB
PEAK_ERROR_MIB = 2.0
#: times and peaks depend on the machine; what is counted does not
TIMES = ("latency_ms.", "first_token_ms.", "next_token_ms.", "train_step_ms")
PEAKS = ("train_peak_mib", "inference_peak_mib")
COUNTS = ("weight_mib", "trainable_parameters")
#: unit of a figure that is a ratio itself
RATIO = "×"
SIGNS = {"better": "▲ better", "worse": "▼ worse", "inconclusive": "≈", None: ""}

STYLES = {"worse": "red", "better": "green"}
HEADS = ("Variant", "Figure", "Before", "After", "Change", "Margin", "")

Interval = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one variant on both sides.

    ``change`` is the ratio of after to before where ``relative``, else the difference, with its 95 % interval; it is
    None where there is no comparison, and ``note`` says why. A ratio has a verdict other than inconclusive where its
    interval lies wholly beyond 1 ± ``margin``. ``verdict`` is None where nothing was compared.
    """

    question: str
    profile: str
    target: str
    variant: str
    machine: str
    figure: str
    unit: str = ""
    before: float | None = None
    after: float | None = None
    relative: bool = True
    change: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float = 0.0
    verdict: Verdict | None = None
    note: str = ""


# ---- which results


def pick(name: str, journal: Journal) -> list[Result]:
    """Read the results of a results folder, of a journal's folder, or those of a git commit that ``journal`` holds.

    A commit is a prefix of its hash, or anything that git can resolve here (HEAD, a branch); ``-dirty`` after it names
    the results that were measured with uncommitted changes. Raises ParetoError where there are none.
    """
    from pareto_runner.journal import Journal

    if not os.path.isdir(name):  # unlike Path.is_dir, it takes any text
        return of_commit(journal.read(), name)
    inner = Path(name) / "journal"
    results = Journal(inner if inner.is_dir() else Path(name)).read()
    if not results:
        raise DataError(f"no results in {name}: name a folder that `pareto bench` wrote, or its journal")
    return results


def of_commit(results: Sequence[Result], name: str) -> list[Result]:
    """The results that were measured at a commit; see :func:`pick`."""
    by_commit: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        commit = str(result.context.get("commit") or "unknown")
        by_commit.setdefault((commit, bool(result.context.get("dirty"))), []).append(result)
    text, dirty = name.removesuffix("-dirty"), name.endswith("-dirty")
    commits = {commit for commit, _ in by_commit}
    found = _starting_with(text, commits) or _starting_with(_resolved(text), commits)
    if len(found) > 1:
        raise ParetoError(f"{name} could be {' or '.join(sorted(found))}: give more of the hash")
    if not found:
        known = {commit[:12] + ("-dirty" if changed else "") for commit, changed in by_commit}
        raise UnknownNameError("folder or commit with results", name, known)
    (commit,) = found
    if (commit, dirty) not in by_commit:
        other = f"{text}{'' if dirty else '-dirty'}"
        how = "without" if dirty else "with"
        raise ParetoError(f"all results of {text} were measured {how} uncommitted changes: name them {other}")
    return by_commit[commit, dirty]


def _starting_with(text: str, commits: set[str]) -> set[str]:
    return {commit for commit in commits if len(text) >= 4 and commit.startswith(text)}


def _resolved(name: str) -> str:
    """Hash of the commit that git knows by this name here; empty where there is none."""
    if name.startswith("-"):
        return ""
    try:
        command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""


# ---- what changed


def compare_journals(before: Sequence[Result], after: Sequence[Result], across_machines: bool = False) -> list[Change]:
    """Compare what both sides hold; what only one of them holds has a row that says so.

    Of two results of one seed on one machine the later one stands. A variant is compared on each machine that both
    sides ran it on; where there is none, the last machines of both are set side by side, without times and peaks
    unless ``across_machines``.
    """
    sides = [_by_variant(before), _by_variant(after)]
    changes: list[Change] = []
    for key in dict.fromkeys(key for side in sides for key in side):
        if all(key in side for side in sides):
            for pair in _pairs(*(side[key] for side in sides)):
                changes += _variant_changes(*pair, across_machines)
        else:
            results = next(side[key] for side in sides if key in side)
            where = "before" if key in sides[0] else "after"
            changes.append(_row(results, results, "variant", note=f"only {where}"))
    return changes


def exit_code(changes: Sequence[Change]) -> int:
    """0 where nothing got worse, 1 where something did, 2 where nothing could be compared."""
    verdicts = {change.verdict for change in changes}
    return 1 if "worse" in verdicts else 0 if verdicts - {None} else 2


def _by_variant(results: Sequence[Result]) -> dict[tuple[str, ...], list[Result]]:
    found: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        spec = result.spec
        found.setdefault((spec.question, spec.profile, spec.target, spec.variant), []).append(result)
    return found


def _pairs(before: Sequence[Result], after: Sequence[Result]) -> list[tuple[list[Result], list[Result]]]:
    """The two sides of a variant by machine, one result for each seed."""
    machines = [list(dict.fromkeys(fingerprint(r.machine) for r in side if r.machine)) for side in (before, after)]
    common = [machine for machine in machines[0] if machine in machines[1]]
    if common:
        return [(_on(machine, before), _on(machine, after)) for machine in common]
    first, second = (known[-1] if known else "" for known in machines)
    return [(_on(first, before), _on(second, after))]


def _on(machine: str, results: Sequence[Result]) -> list[Result]:
    """The last result of each seed on a machine; what ended before it knew its machine counts for each."""
    return list({r.spec.seed: r for r in results if not r.machine or fingerprint(r.machine) == machine}.values())


def _variant_changes(before: list[Result], after: list[Result], across_machines: bool) -> Iterator[Change]:
    """All rows of one variant on one machine."""
    yield from _ends(before, after)
    old, new = ([result for result in side if result.status == "ok"] for side in (before, after))
    if not old or not new:
        return
    if old[0].spec.task != new[0].spec.task:
        yield _row(old, new, "task", note="the task's fields differ, so nothing is compared")
        return
    fields = [name for name in ("stages", "engine") if getattr(old[0].spec, name) != getattr(new[0].spec, name)]
    if fields:
        yield _row(old, new, "specification", note=f"other {' and '.join(fields)}")
    yield _score(old, new)
    seeds = {result.spec.seed for result in old} & {result.spec.seed for result in new}
    if seeds:
        old, new = ([result for result in side if result.spec.seed in seeds] for side in (old, new))
    yield from _counts(old, new)
    same = fingerprint(old[0].machine) == fingerprint(new[0].machine)
    if not same and not across_machines:
        note = "measured on different machines, so not compared; --across-machines compares them all the same"
        yield _row(old, new, "times and peaks", note=note)
        return
    note = "" if same else "different machines"
    yield from (dataclasses.replace(change, note=_joined(change.note, note)) for change in _measured(old, new))


def _row(old: Sequence[Result], new: Sequence[Result], figure: str, **values: Any) -> Change:
    """A row of what the two sides hold of one variant; ``values`` are the other fields of :class:`Change`."""
    spec = new[0].spec
    machines = [next((result.machine for result in side if result.machine), {}) for side in (old, new)]
    names = list(dict.fromkeys(map(machine_line, machines)))
    if len(names) == 1 and machines[0] != machines[1]:
        names.append("the same model, set up differently")
    return Change(
        question=spec.question,
        profile=spec.profile,
        target=spec.target,
        variant=spec.variant,
        machine=" → ".join(names),
        figure=figure,
        **values,
    )


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _ends(before: Sequence[Result], after: Sequence[Result]) -> Iterator[Change]:
    """A row where seeds ended otherwise than before."""
    earlier = {result.spec.seed: result.status for result in before}
    ok_before = "ok" in earlier.values()
    failed = [r for r in after if r.status == "failed" and ok_before and earlier.get(r.spec.seed) != "failed"]
    if failed:
        reasons = _joined(*dict.fromkeys(result.reason for result in failed))
        note = f"{_seeds(failed)} failed: {reasons}"
        yield _row(before, after, "how it ended", verdict="worse", note=note)
        return
    mended = [r for r in after if r.status == "ok" and earlier.get(r.spec.seed) == "failed"]
    if mended:
        yield _row(before, after, "how it ended", verdict="better", note=f"{_seeds(mended)} failed before")
        return
    for status in ("failed", "unsupported"):
        found = [result for result in after if result.status == status]
        if found:
            was = "as before" if status in earlier.values() else f"{'ok' if ok_before else 'unsupported'} before"
            note = f"{_seeds(found)} {status}, {was}: {found[0].reason}"
            yield _row(before, after, "how it ended", note=note)


def _seeds(results: Sequence[Result]) -> str:
    return ("seed " if len(results) == 1 else "seeds ") + ", ".join(str(result.spec.seed) for result in results)


def _score(before: Sequence[Result], after: Sequence[Result]) -> Change:
    """The difference of the scores, or why there is none."""
    from pareto_runner.compare import comparable, seeds_difference

    earlier = {result.spec.seed: result for result in before if has_score(result)}
    pairs = [(earlier[r.spec.seed], r) for r in after if has_score(r) and r.spec.seed in earlier]
    pairs = [(old, new) for old, new in pairs if comparable(new, old)]
    found = seeds_difference([new for _, new in pairs], [old for old, _ in pairs])
    if found is None:
        name = next((result.metric for result in (*after, *before) if result.metric), "score")
        return _row(before, after, name, relative=False, note=f"not compared: {_why_not(before, after)}")
    scores = [[item for r in side if (item := r.measurement(found.name))] for side in zip(*pairs, strict=True)]
    return _row(
        before,
        after,
        found.name,
        unit=scores[0][0].unit,
        before=statistics.fmean(item.value for item in scores[0]),
        after=statistics.fmean(item.value for item in scores[1]),
        relative=False,
        change=found.difference,
        low=found.low,
        high=found.high,
        verdict=found.verdict,
    )


def _why_not(before: Sequence[Result], after: Sequence[Result]) -> str:
    """Why two sides' scores cannot be paired item by item."""
    sides = (before, after)
    if not all(any(has_score(result) for result in side) for side in sides):
        return "a side has no score"
    if not all(any(result.resampled for result in side) for side in sides):
        return "a side has no resampled scores"
    if {result.metric for result in before} != {result.metric for result in after}:
        return "the metrics differ"
    if not {result.spec.seed for result in before} & {result.spec.seed for result in after}:
        return "no seed in common"
    return "the data differ"


def _counts(before: Sequence[Result], after: Sequence[Result]) -> Iterator[Change]:
    """Weights and parameters: one number on each side, known without error."""
    for name in COUNTS:
        values = _medians(before, after, name)
        if values is not None and values[0] > 0:
            change = values[1] / values[0]
            yield _ratio_row(before, after, name, values, (change, change, change), 0.0)


def _measured(before: Sequence[Result], after: Sequence[Result]) -> Iterator[Change]:
    """Times, against the baseline and as they stand, and peaks of memory."""
    names = dict.fromkeys(item.name for side in (after, before) for result in side for item in result.measurements)
    for name in names:
        if name.startswith(TIMES):
            yield from _time_against_baseline(before, after, name)
            yield from _time(before, after, name)
    for name in PEAKS:
        values = _medians(before, after, name)
        if values is not None and min(values) > PEAK_ERROR_MIB:
            old, new = ([value for r in side if (value := r.value(name)) is not None] for side in (before, after))
            low = (min(new) - PEAK_ERROR_MIB) / (max(old) + PEAK_ERROR_MIB)
            high = (max(new) + PEAK_ERROR_MIB) / max(min(old) - PEAK_ERROR_MIB, 1e-9)
            yield _ratio_row(before, after, name, values, (values[1] / values[0], low, high), PEAKS_APART)


def _medians(before: Sequence[Result], after: Sequence[Result], name: str) -> tuple[float, float] | None:
    """Medians over the seeds of both sides, None where one has no such figure, or of another kind."""
    found = [[item for r in side if (item := r.measurement(name)) is not None] for side in (before, after)]
    kinds = {item.kind for items in found for item in items}
    if not all(found) or len(kinds) > 1:
        return None
    old, new = (statistics.median(item.value for item in items) for items in found)
    return (old, new) if all(abs(value) < LARGEST for value in (old, new)) else None


def _time_against_baseline(before: Sequence[Result], after: Sequence[Result], name: str) -> Iterator[Change]:
    """The ratio of the sides' ratios to one baseline, where both have them."""
    from pareto_runner.compare import RESOLUTION

    baseline = after[0].spec.baseline
    sides = [_ratio_to(side, name, baseline) for side in (before, after)]
    if baseline is None or None in sides:
        return
    old, new = (side for side in sides if side is not None)
    parts = [max(RESOLUTION, side.margin) for side in (old, new)]
    interval = quotient((old.ratio, old.low, old.high), (new.ratio, new.low, new.high))
    figure = f"{name} against {baseline}"
    # either ratio may be off by its margin
    yield _ratio_row(before, after, figure, (old.ratio, new.ratio), interval, (1 + parts[0]) * (1 + parts[1]) - 1)


def _ratio_to(side: Sequence[Result], name: str, baseline: str | None) -> Comparison | None:
    """A variant's ratio to the baseline over its seeds; None where a seed has none that is a ratio of times."""
    found = [c for result in side for c in result.comparisons if c.name == name and c.baseline == baseline]
    if len(found) < len(side) or any(not 0 < c.low <= c.ratio <= c.high < LARGEST for c in found):
        return None
    return combine_ratio(found)


def _time(before: Sequence[Result], after: Sequence[Result], name: str) -> Iterator[Change]:
    """The ratio of the medians of two sessions."""
    values = _medians(before, after, name)
    if values is None or min(values) <= 0:
        return
    old, new = (_envelope(side, name, value) for side, value in zip((before, after), values, strict=True))
    if old is None or new is None:
        note = "no interval: too few samples, or a result of an older version"
        yield _row(before, after, name, unit="ms", before=values[0], after=values[1], note=note)
        return
    found = _ratio_row(before, after, name, values, quotient(old, new), SESSIONS_APART)
    if min(len(before), len(after)) < 2:
        note = "one session a side"
        found = dataclasses.replace(found, verdict="inconclusive", note=note)
    yield found


def _envelope(side: Sequence[Result], name: str, median: float) -> Interval | None:
    """The median over seeds, and the bounds that hold all seeds' intervals."""
    items = [item for result in side if (item := result.measurement(name)) is not None]
    lows = [item.interval_low for item in items if item.interval_low is not None]
    highs = [item.interval_high for item in items if item.interval_high is not None]
    if len(lows) < len(items) or len(highs) < len(items):
        return None
    low, high = min(lows), max(highs)
    return (median, low, high) if 0 < low <= median <= high < LARGEST else None


def quotient(before: Interval, after: Interval) -> Interval:
    """Divide two independent figures with intervals, each (value, low, high) and positive.

    On the logarithmic scale the distances of the quotient's bounds are the root of the sum of squares of the distances
    that move it the same way (Zou and Donner 2008, "Construction of confidence intervals about effect measures").
    """
    old, old_low, old_high = map(math.log, before)
    new, new_low, new_high = map(math.log, after)
    middle = new - old
    low = middle - math.hypot(new - new_low, old_high - old)
    high = middle + math.hypot(new_high - new, old - old_low)
    return math.exp(middle), math.exp(low), math.exp(high)


def _ratio_row(
    before: Sequence[Result],
    after: Sequence[Result],
    figure: str,
    values: tuple[float, float],
    interval: Interval,
    margin: float,
) -> Change:
    """A row of a cost: the lower the better."""
    from pareto_runner.compare import verdict

    item = after[0].measurement(figure)
    change, low, high = interval
    return _row(
        before,
        after,
        figure,
        unit=item.unit if item else RATIO,
        before=values[0],
        after=values[1],
        change=change,
        low=low,
        high=high,
        margin=margin,
        verdict=verdict(low, high, margin),
        note="computed by a compiler" if item and item.kind == "compiled" else "",
    )


# ---- as text


def summary(changes: Sequence[Change]) -> str:
    """How many figures became what."""
    counts = Counter(change.verdict for change in changes)
    parts = [f"{counts[verdict]} {verdict}" for verdict in ("worse", "better", "inconclusive")]
    parts += [f"{counts[None]} not compared"] if counts[None] else []
    compared = len(changes) - counts[None]
    text = f"{', '.join(parts)}. A ratio is to the baseline's time, measured in turns with it."
    return text if compared < 20 else f"{text} Each verdict holds at 95 %: of {compared}, some are chance."


def terminal_table(changes: Sequence[Change]) -> Group:
    """A table of all figures for each question and machine, what has no figures under it, and a summary."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for heading, rows in _blocks(changes).items():
        parts.append(Text(clean(heading, 200), style="bold"))
        figures = [change for change in rows if change.before is not None]
        parts += [_figures_table(figures)] if figures else []
        for change in rows:
            if change.before is None:
                verdict = f"{SIGNS[change.verdict]}: " if change.verdict else ""
                text = f"{verdict}{change.variant}, {_title(change).lower()}: {change.note}"
                parts.append(Text(clean(text, 400), style=STYLES.get(change.verdict or "", "")))
        parts.append(Text(""))
    return Group(*parts, Text(summary(changes)))


def _figures_table(changes: Sequence[Change]) -> Table:
    """One line for each figure, under the names of the variants."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(HEADS[1], overflow="fold")
    for head in HEADS[2:5]:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for variant in dict.fromkeys(change.variant for change in changes):
        table.add_row(Text(clean(variant, 60), style="bold"))
        for change in changes:
            if change.variant == variant:
                *cells, told, verdict = _cells(change)[1:]
                cells.append(f"{verdict} {told}" if change.verdict == "inconclusive" else verdict)
                table.add_row(*(Text(clean(text, 80)) for text in cells), style=STYLES.get(change.verdict or ""))
    return table


def markdown(changes: Sequence[Change]) -> str:
    """What got worse or better, and the rest folded away: for a comment on a change."""
    lines = ["### Benchmarks", "", summary(changes), ""]
    told = [change for change in changes if change.verdict in ("worse", "better")]
    rest = [change for change in changes if change.verdict not in ("worse", "better")]
    for heading, rows in _blocks(sorted(told, key=lambda change: change.verdict != "worse")).items():
        lines += _markdown_table(heading, rows)
    if rest:
        lines += [f"<details><summary>{len(rest)} other figures</summary>", ""]
        for heading, rows in _blocks(rest).items():
            lines += _markdown_table(heading, rows)
        lines += ["</details>", ""]
    return "\n".join(lines)


def _markdown_table(heading: str, rows: Sequence[Change]) -> list[str]:
    heads = [f"| {' | '.join(HEADS)} |", "|---|---|--:|--:|--:|--:|---|"]
    body = ["| " + " | ".join(escape_markdown(text) for text in _cells(row)) + " |" for row in rows]
    return [f"**{escape_markdown(heading)}**", "", *heads, *body, ""]


def _blocks(changes: Sequence[Change]) -> Mapping[str, list[Change]]:
    blocks: dict[str, list[Change]] = {}
    for change in changes:
        heading = " · ".join((change.question, change.profile, change.target, change.machine))
        blocks.setdefault(heading, []).append(change)
    return blocks


def _title(change: Change) -> str:
    """What a figure is called, with its unit."""
    name, _, baseline = change.figure.partition(" against ")
    head, _, request = name.removesuffix("_mib").partition(".")
    title = " ".join(part for part in (words(head.removesuffix("_ms")), words(request).lower()) if part)
    return title + (", ratio" if baseline else f" ({change.unit})" if change.unit in ("ms", "MiB", "%") else "")


def _cells(change: Change) -> list[str]:
    """Texts of a row; a note stands in place of the change where there is none."""
    sides = [_side(value, change.unit) for value in (change.before, change.after)]
    row = [change.variant, _title(change), *sides]
    if change.change is None or change.low is None or change.high is None:
        return [*row, change.note, "", SIGNS[change.verdict]]
    ends = (change.change, change.low, change.high)
    text = ratio(*ends) if change.relative else difference(*ends, change.unit)
    same = change.before == change.after and change.low == change.high
    verdict = SIGNS[change.verdict] + (f" ({change.note})" if change.note else "")
    return [*row, "same" if same else text, margin(change.margin) if change.margin else "", verdict]


def _side(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.3f}" if unit == RATIO else number(value, unit)
