"""Turns results into something to read: a terminal table, Markdown, one HTML file, figures and CSV.

Results become sections and rows (sections.py), rows become tables of text (tables.py), and the templates beside this
module lay the tables out with the figures (plots.py, drawing.py).
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core import DataError, Result
from pareto_core.result import Comparison, Difference
from pareto_runner import plots
from pareto_runner.drawing import Picture, beside
from pareto_runner.sections import LARGEST, QuestionInfo, Row, Section, make_sections
from pareto_runner.tables import (
    SIGNS,
    best_score,
    columns,
    controls,
    environment_tables,
    failures,
    figure_cell,
    parameters_cell,
    reference_table,
    results_table,
    rivalries,
    score_cell,
    score_head,
)
from pareto_runner.wording import escape_markdown, number, show

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

    from pareto_runner.journal import Damaged

#: points of a training curve at the most, and optimizer steps that each averages at the least
CURVE_POINTS, STEPS_PER_POINT = 80, 8
#: what is said of a paper
PAPER = ("authors", "year", "title", "url")
LEGEND = (
    "Score: mean over seeds ± half of its 95 % Student interval (three seeds or more), both scores (two seeds), or its "
    "95 % bootstrap interval over the test items (one seed). Below it, the difference to the baseline's score over the "
    "same items and seeds, with its 95 % interval; p is McNemar's exact test.",
    "Other figures: median over seeds. In brackets its 95 % interval, which spans the intervals of all seeds; then the "
    "medians of the seeds' p10 and p90.",
    "× is the ratio to the baseline, measured in turns with it: geometric mean over seeds. Its interval spans the 95 % "
    "bootstrap intervals of all seeds. A verdict (▲ better, ▼ worse) stands only where all seeds give it and the "
    "interval lies wholly beyond what this machine tells apart, which the head of the column says; ≈ is inconclusive.",
    "Results of different machines have tables of their own, and no figure is combined or compared over machines.",
)


# ---- figures


def pareto_panels(section: Section) -> list[plots.Panel]:
    """Score against latency, training memory and trainable parameters: those that were taken on two variants or more.

    Of several latencies the first is drawn; where nothing was trained, inference memory stands for training memory.
    """
    heads = dict(columns(section))
    names = list(heads)
    speed = next((name for name in names if name.startswith(("latency_ms", "next_token_ms", "first_token_ms"))), None)
    memory = next((name for name in ("train_peak_mib", "inference_peak_mib") if name in names), None)
    wanted = [("latency", speed), ("memory", memory), ("parameters", "trainable_parameters")]
    panels = []
    for kind, name in wanted:
        points = _points(section, name) if name else ()
        if len(points) >= 2:
            label = heads.get(str(name), "Trainable parameters")
            panels.append(
                plots.Panel(
                    name=kind,
                    x_label=label,
                    y_label=score_head(section),
                    points=points,
                    higher_is_better=all(result.higher_is_better for result in section.results),
                )
            )
    return panels


def _points(section: Section, name: str) -> tuple[plots.Point, ...]:
    points = []
    for series, row in enumerate(section.rows):
        cost, score = row.figures.get(name), row.figures.get(section.metric)
        if cost is None or score is None or not _can_be_drawn(cost.value, score.value):
            continue
        points.append(
            plots.Point(
                label=row.variant,
                x=cost.value,
                y=score.value,
                series=series,
                x_range=cost.interval if cost.interval and _can_be_drawn(*cost.interval) else None,
                y_range=score.interval if score.interval and _can_be_drawn(*score.interval) else None,
                compiled=cost.compiled or score.compiled,
            )
        )
    return tuple(points)


def _can_be_drawn(*values: float) -> bool:
    return all(value == 0 or 1 / LARGEST < abs(value) < LARGEST for value in values)


def training_curves(section: Section) -> list[plots.Curve]:
    """Training loss of each variant that trained: averaged over bins of steps, then over seeds."""
    curves = []
    for series, row in enumerate(section.rows):
        seeds = [result.curve for result in row.ok if _is_curve(result.curve)]
        if not seeds:
            continue
        steps, losses = _binned(seeds)
        curves.append(
            plots.Curve(
                label=row.variant,
                series=series,
                steps=tuple(steps),
                mean=tuple(statistics.fmean(values) for values in losses),
                low=tuple(min(values) for values in losses),
                high=tuple(max(values) for values in losses),
            )
        )
    return curves


def _binned(seeds: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[float], list[list[float]]]:
    """Middles of bins of steps, and for each the mean loss of every seed that has steps in it."""
    steps = [step for curve in seeds for step, _ in curve]
    first, length = min(steps), max(steps) - min(steps) + 1
    count = min(CURVE_POINTS, max(2, min(map(len, seeds)) // STEPS_PER_POINT))
    bins: list[list[list[float]]] = [[[] for _ in seeds] for _ in range(count)]
    for k, curve in enumerate(seeds):
        for step, loss in curve:
            bins[(step - first) * count // length][k].append(loss)
    kept = [i for i in range(count) if any(bins[i])]
    losses = [[statistics.fmean(values) for values in bins[i] if values] for i in kept]
    return [first + (i + 0.5) * length / count for i in kept], losses


def _is_curve(curve: Sequence[tuple[int, float]]) -> bool:
    """Whether there are two steps or more, and nothing that could not be drawn."""
    steps, losses = zip(*curve, strict=True) if curve else ((), ())
    return len(set(steps)) >= 2 and max(map(abs, (*steps, *losses))) < LARGEST


def front_names(section: Section) -> list[str]:
    """Variants on the front of the first panel."""
    panels = pareto_panels(section)
    if not panels:
        return []
    return [panels[0].points[i].label for i in plots.front(panels[0].points, panels[0].higher_is_better)]


# ---- files


def write_report(
    results: Sequence[Result],
    questions: Mapping[str, QuestionInfo],
    directory: Path,
    damaged: Sequence[Damaged] = (),
) -> Path:
    """Write ``report.html``, ``report.md`` and each question's figures and CSV to ``directory``; return the HTML file.

    ``damaged`` are the files of the journal that could not be read: the report lists them. Raises :class:`DataError`
    where there are no results, or where the disk takes no report.
    """
    if not results:
        raise DataError("no results to report on: run `pareto bench` first, or name the journal that has them")
    sections = make_sections(results, questions)
    path = Path(directory) / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = {section.slug: _write_figures(section, path.parent) for section in sections}
        values = _template_values(results, sections, pictures)
        values["damaged"] = [(item.path.name, item.reason) for item in damaged]
        _write(path.with_suffix(".md"), _render("report.md.j2", values))
        _write(path, _render("report.html.j2", values))
    except OSError as error:
        problem = f"the report could not be written to {directory}: {error.strerror or error}"
        raise DataError(f"{problem}; no result is lost, and `pareto report` writes it from the journal") from error
    return path


def _write(path: Path, text: str) -> None:
    content = text.encode("utf-8", errors="replace")  # a name out of JSON can hold half a surrogate pair
    _replace(path, lambda new: new.write_bytes(content))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file that takes the place of ``path`` when it is whole."""
    new = path.with_name(f".{path.name}")
    try:
        write(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _write_figures(section: Section, directory: Path) -> dict[str, list[str]]:
    """Write a section's figures and their data; return the inline SVG of each by kind."""
    inline: dict[str, list[str]] = {"pareto": [], "curves": []}
    _write(directory / f"{section.slug}-pareto.csv", section_csv(section))
    panels = pareto_panels(section)
    if panels:
        pictures = [plots.pareto_picture(panel) for panel in panels]
        titles = [f"{section.title}: {panel.y_label} against {panel.x_label}" for panel in panels]
        inline["pareto"] = [picture.svg(title) for picture, title in zip(pictures, titles, strict=True)]
        _save(beside(pictures), f"Pareto fronts: {section.title}", directory / f"{section.slug}-pareto")
    curves = training_curves(section)
    if curves:
        picture, title = plots.curves_picture(curves), f"Training loss: {section.title}"
        inline["curves"] = [picture.svg(title)]
        _save(picture, title, directory / f"{section.slug}-curves")
        _write(directory / f"{section.slug}-curves.csv", curves_csv(curves))
    return inline


def _save(picture: Picture, title: str, stem: Path) -> None:
    _write(stem.with_suffix(".svg"), picture.svg(title, standalone=True))
    _replace(stem.with_suffix(".png"), picture.save_png)


def section_csv(section: Section) -> str:
    """All figures of a section, one row per variant, without rounding.

    Each figure with its interval, its p10 and p90 (two seeds' scores), its ratio and verdict; the score with its
    difference.
    """
    names = list(dict.fromkeys(name for row in section.rows for name in row.figures))
    compared = list(dict.fromkeys(name for row in section.rows for name in row.ratios))
    heads = ["question", "profile", "target", "machine", "variant", "status", "seeds", "seeds_ok", "front", "reason"]
    ends = ("interval_low", "interval_high", "low", "high", "kind")
    heads += [f"{name}{part}" for name in names for part in ("", *(f".{end}" for end in ends))]
    parts = (".low", ".high", ".margin", ".baseline", ".verdict")
    heads += [f"ratio.{name}{part}" for name in compared for part in ("", *parts)]
    parts = (".low", ".high", ".p_value", ".baseline", ".verdict")
    heads += [f"difference.{section.metric}{part}" for part in ("", *parts)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    best = front_names(section)
    for row in section.rows:
        spec = row.results[0].spec
        status = "ok" if row.ok else row.results[0].status
        line: list[Any] = [spec.question, spec.profile, spec.target, section.machine, row.variant, status]
        line += [len(row.results), len(row.ok), row.variant in best, " · ".join(reason for _, reason in row.problems)]
        for name in names:
            figure = row.figures.get(name)
            kind = "compiled" if figure and figure.compiled else "measured"
            pairs = (*(figure.interval or (None, None)), *(figure.spread or (None, None))) if figure else ()
            line += [figure.value, *pairs, kind] if figure else [None] * (1 + len(ends))
        for name in compared:
            line += _values(row.ratios.get(name), "ratio", "low", "high", "margin", "baseline", "verdict")
        line += _values(row.difference, "difference", "low", "high", "p_value", "baseline", "verdict")
        writer.writerow(line)
    return out.getvalue()


def _values(found: Comparison | Difference | None, *fields: str) -> list[Any]:
    return [getattr(found, field) if found else None for field in fields]


def curves_csv(curves: Sequence[plots.Curve]) -> str:
    """The points of the training curves, as drawn."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["variant", "step", "loss", "low", "high"])
    for curve in curves:
        points = zip(curve.steps, curve.mean, curve.low, curve.high, strict=True)
        writer.writerows((curve.label, *point) for point in points)
    return out.getvalue()


def _template_values(
    results: Sequence[Result], sections: Sequence[Section], pictures: Mapping[str, Mapping[str, list[str]]]
) -> dict[str, Any]:
    """What both templates show, as text."""
    statuses = [result.status for result in results]
    environment = environment_tables(results)
    return {
        "counts": {status: statuses.count(status) for status in ("ok", "failed", "unsupported")},
        "total": len(results),
        "questions": len({section.info.name for section in sections}),
        "blocks": [_block(section, pictures[section.slug]) for section in sections],
        "environment": environment,
        "machines": {name: f"machine-{number}" for number, (name, _) in enumerate(environment, 1)},
        "legend": LEGEND,
        "signs": SIGNS,
        "times": sorted(str(r.context["time"])[:16].replace("T", " ") for r in results if r.context.get("time")),
        "commits": sorted({_commit(result) for result in results if result.context.get("commit")}),
    }


def _block(section: Section, pictures: Mapping[str, list[str]]) -> dict[str, Any]:
    """What the templates show of a section."""
    papers = {show(result.paper): result.paper for result in section.results if result.paper}
    majority = [f.value for row in section.rows if (f := row.figures.get("majority_accuracy"))]
    statuses = [result.status for result in section.results]
    return {
        "section": section,
        "table": results_table(section),
        "counts": {status: statuses.count(status) for status in ("ok", "failed", "unsupported")},
        "best": best_score(section),
        "compiled": any(figure.compiled for row in section.rows for figure in row.figures.values()),
        "majority": number(statistics.median(majority), "%") if majority else "",
        "references": [
            (reference, reference_table(section, reference))
            for reference in section.info.references
            if any(row.ok for row in section.rows)
        ],
        "controls": controls(section),
        "rivals": rivalries(section),
        "failures": failures(section),
        "front": front_names(section),
        "papers": [{key: show(paper.get(key, "")) for key in PAPER} for paper in papers.values()],
        "pictures": pictures,
    }


def _commit(result: Result) -> str:
    return str(result.context["commit"])[:10] + (" (with uncommitted changes)" if result.context.get("dirty") else "")


def _render(name: str, values: Mapping[str, Any]) -> str:
    """Fill a template; every value is escaped, for HTML or for a Markdown table."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    html = name.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=None if html else _markdown,
    )
    environment.filters["link"] = _link
    return environment.get_template(name).render(values)


def _markdown(value: Any) -> Any:
    """Make text safe inside Markdown; what a template made is safe already."""
    from markupsafe import Markup

    return Markup(escape_markdown(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _link(url: Any) -> str:
    """Return ``url`` where it is a web address, else nothing."""
    text = str(url)
    return text if re.match(r"https?://[^\s\"'<>()]+$", text) else ""


# ---- terminal


def terminal_table(results: Sequence[Result]) -> TerminalTable:
    """The short form for the end of a suite: score, parameters, first latency, training step and memory."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title="Results" if results else "No results",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Variant", overflow="fold", min_width=16)
    for head in ("Score", "Trained", "ms", "×", "Step", "×", "MiB"):
        table.add_column(head, justify="right", no_wrap=True)
    notes = Text()
    for section in make_sections(results, {}):
        for row in section.rows:
            texts = [row.variant, *_terminal_cells(section, row)]
            table.add_row(*(Text(plots.clean(text, 60)) for text in texts))
            for status, reason in row.problems:
                notes.append(plots.clean(f"{row.variant} {status}: {reason}", 200) + "\n")
        seeds = len({result.spec.seed for result in section.results})
        note = f"{section.title}: {section.machine}, {seeds} seed{'s' if seeds > 1 else ''}"
        notes.append(plots.clean(note, 200) + "\n")
        table.add_section()
    table.caption, table.caption_justify = notes, "left"
    return table


def _terminal_cells(section: Section, row: Row) -> list[str]:
    """Texts of a row after its name and seeds."""
    if not row.ok:
        return [row.problems[0][0]]
    names = [name for name, _ in columns(section)]
    speed = next((name for name in names if name.startswith(("latency_ms", "next_token_ms"))), "")
    texts = [score_cell(row).text, parameters_cell(row).spread]
    for name in (speed, "train_step_ms"):
        cell = figure_cell(row, name)
        texts += [cell.text, f"{cell.change.split()[0]} {SIGNS[cell.verdict]}" if cell.change else ""]
    return [*texts, figure_cell(row, "train_peak_mib").text]
