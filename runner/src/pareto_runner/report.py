"""Turns results into something to read: a terminal table, Markdown, one HTML file, figures and CSV.

Results become sections and rows (sections.py), rows become tables of text (tables.py), and the templates beside this
module lay the tables out with the figures (plots.py).
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core import DataError, Result
from pareto_runner import plots
from pareto_runner.sections import Figure, QuestionInfo, Row, Section, make_sections
from pareto_runner.tables import (
    SIGNS,
    columns,
    controls,
    environment_tables,
    figure_cell,
    parameters_cell,
    reference_table,
    results_table,
    rivalries,
)
from pareto_runner.wording import number

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

#: points of a training curve at the most, and optimizer steps that each averages at the least
CURVE_POINTS, STEPS_PER_POINT = 80, 8
LEGEND = (
    "Score: mean over seeds ± half of its 95 % Student interval (three seeds or more), or the extremes (two seeds).",
    "Other figures: median over seeds; in small print the medians of the seeds' p10 and p90.",
    "× is the ratio to the baseline, measured in turns with it: geometric mean over seeds. Its interval spans the 95 % "
    "bootstrap intervals of all seeds, and a verdict (▲ better, ▼ worse) stands only where all seeds give it; "
    "≈ is inconclusive.",
)


# ---- figures


def pareto_panels(section: Section) -> list[plots.Panel]:
    """Score against latency, training memory and trainable parameters: those that were taken on two variants or more.

    Of several latencies the first is drawn; where nothing was trained, inference memory stands for training memory.
    """
    names = [name for name, _ in columns(section)]
    heads = dict(columns(section))
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
                    y_label=results_table(section).heads[1],
                    points=points,
                    higher_is_better=all(result.higher_is_better for result in section.results),
                )
            )
    return panels


def _points(section: Section, name: str) -> tuple[plots.Point, ...]:
    points = []
    for series, row in enumerate(section.rows):
        cost, score = row.figures.get(name), row.figures.get(section.metric)
        if cost is None or score is None:
            continue
        points.append(
            plots.Point(
                label=row.variant,
                x=cost.value,
                y=score.value,
                series=series,
                x_range=_range(cost),
                y_range=_range(score),
                compiled=cost.compiled or score.compiled,
            )
        )
    return tuple(points)


def _range(figure: Figure) -> tuple[float, float] | None:
    return (figure.low, figure.high) if figure.low is not None and figure.high is not None else None


def curve_lines(section: Section) -> list[plots.Line]:
    """Training loss of each variant that trained: averaged over bins of steps, then over seeds."""
    lines = []
    for series, row in enumerate(section.rows):
        curves = [result.curve for result in row.ok if len(result.curve) >= 2]
        if not curves:
            continue
        last = max(curve[-1][0] for curve in curves)
        count = min(CURVE_POINTS, max(2, min(len(curve) for curve in curves) // STEPS_PER_POINT))
        bins: list[list[list[float]]] = [[[] for _ in curves] for _ in range(count)]
        for k, curve in enumerate(curves):
            for step, loss in curve:
                bins[min(count - 1, int(step / (last + 1) * count))][k].append(loss)
        kept = [(i, [statistics.fmean(seed) for seed in seeds if seed]) for i, seeds in enumerate(bins) if any(seeds)]
        lines.append(
            plots.Line(
                label=row.variant,
                series=series,
                steps=tuple((i + 0.5) * (last + 1) / count for i, _ in kept),
                mean=tuple(statistics.fmean(values) for _, values in kept),
                low=tuple(min(values) for _, values in kept),
                high=tuple(max(values) for _, values in kept),
            )
        )
    return lines


def front_names(section: Section) -> list[str]:
    """Variants on the front of the first panel."""
    panels = pareto_panels(section)
    if not panels:
        return []
    return [panels[0].points[i].label for i in plots.front(panels[0].points, panels[0].higher_is_better)]


# ---- files


def write_report(results: Sequence[Result], questions: Mapping[str, QuestionInfo], directory: Path) -> Path:
    """Write ``report.html``, ``report.md`` and each question's figures and CSV to ``directory``; return the HTML file.

    Raises :class:`DataError` where there are no results.
    """
    if not results:
        raise DataError("no results to report on: run `pareto bench` first, or name the journal that has them")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sections = make_sections(results, questions)
    pictures = {section.slug: _write_figures(section, directory) for section in sections}
    for section in sections:
        _write(directory / f"{section.slug}-pareto.csv", section_csv(section))
    values = _template_values(results, sections, pictures)
    _write(directory / "report.md", _render("report.md.j2", values))
    path = directory / "report.html"
    _write(path, _render("report.html.j2", values))
    return path


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _write_figures(section: Section, directory: Path) -> dict[str, list[str]]:
    """Write a section's figures; return the inline SVG of each by kind."""
    inline: dict[str, list[str]] = {"pareto": [], "curves": []}
    panels = pareto_panels(section)
    if panels:
        figure = plots.pareto_figure(panels)
        _write(directory / f"{section.slug}-pareto.svg", plots.svg(figure))
        plots.save_png(figure, directory / f"{section.slug}-pareto.png")
        for panel in panels:
            single = plots.pareto_figure([panel])
            inline["pareto"].append(plots.svg(single, f"{section.slug}-{panel.name}-", standalone=False))
    lines = curve_lines(section)
    if lines:
        figure = plots.curves_figure(lines)
        _write(directory / f"{section.slug}-curves.svg", plots.svg(figure))
        plots.save_png(figure, directory / f"{section.slug}-curves.png")
        _write(directory / f"{section.slug}-curves.csv", curves_csv(lines))
        inline["curves"].append(plots.svg(figure, f"{section.slug}-curves-", standalone=False))
    return inline


def section_csv(section: Section) -> str:
    """All figures of a section, one row per variant: value, spread, ratio and verdict of each, without rounding."""
    names = list(dict.fromkeys(name for row in section.rows for name in row.figures))
    compared = list(dict.fromkeys(name for row in section.rows for name in row.ratios))
    heads = ["question", "profile", "target", "machine", "variant", "status", "seeds", "seeds_ok", "front", "reason"]
    heads += [f"{name}{part}" for name in names for part in ("", ".low", ".high", ".kind")]
    heads += [f"ratio.{name}{part}" for name in compared for part in ("", ".low", ".high", ".baseline", ".verdict")]
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
            line += [figure.value, figure.low, figure.high, kind] if figure else [None] * 4
        for name in compared:
            ratio = row.ratios.get(name)
            line += [ratio.ratio, ratio.low, ratio.high, ratio.baseline, ratio.verdict] if ratio else [None] * 5
        writer.writerow(line)
    return out.getvalue()


def curves_csv(lines: Sequence[plots.Line]) -> str:
    """The points of the training curves, as drawn."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["variant", "step", "loss", "low", "high"])
    for line in lines:
        writer.writerows((line.label, *row) for row in zip(line.steps, line.mean, line.low, line.high, strict=True))
    return out.getvalue()


def _template_values(
    results: Sequence[Result], sections: Sequence[Section], pictures: Mapping[str, Mapping[str, list[str]]]
) -> dict[str, Any]:
    """What both templates show, as text."""
    statuses = [result.status for result in results]
    blocks = []
    for section in sections:
        failures = [(row.variant, row.seeds, *problem) for row in section.rows for problem in row.problems]
        papers = {(p.get("title", ""), p.get("url", "")): p for p in (r.paper for r in section.results) if p}
        majority = [f.value for row in section.rows if (f := row.figures.get("majority_accuracy"))]
        blocks.append(
            {
                "section": section,
                "table": results_table(section),
                "compiled": any(figure.compiled for row in section.rows for figure in row.figures.values()),
                "majority": number(statistics.median(majority), "%") if majority else "",
                "references": [
                    (reference, reference_table(section, reference))
                    for reference in section.info.references
                    if any(row.ok for row in section.rows)
                ],
                "controls": controls(section),
                "rivals": rivalries(section),
                "failures": failures,
                "front": front_names(section),
                "papers": list(papers.values()),
                "pictures": pictures[section.slug],
            }
        )
    return {
        "counts": {status: statuses.count(status) for status in ("ok", "failed", "unsupported")},
        "total": len(results),
        "questions": len({section.info.name for section in sections}),
        "blocks": blocks,
        "environment": environment_tables(results),
        "legend": LEGEND,
        "signs": SIGNS,
        "times": sorted(str(r.context["time"])[:16].replace("T", " ") for r in results if r.context.get("time")),
        "commits": sorted({_commit(result) for result in results if result.context.get("commit")}),
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
    """Make text safe inside Markdown, table cells included; what a template made is safe already."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_\[\]|#])", r"\\\1", text))


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
    texts = [figure_cell(row, section.metric, is_score=True).text, parameters_cell(row).spread]
    for name in (speed, "train_step_ms"):
        cell = figure_cell(row, name)
        texts += [cell.text, f"{cell.ratio.split()[0]} {SIGNS[cell.verdict]}" if cell.ratio else ""]
    return [*texts, figure_cell(row, "train_peak_mib").text]
