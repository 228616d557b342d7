"""The report: figures in its tables by hand, hostile names, seeds that failed, and nothing to report on."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from pareto_core import DataError, Measurement, Result
from pareto_runner import report, sections, tables, wording
from pareto_runner.sections import QuestionInfo, Reference

SAMPLES = runpy.run_path(str(Path(__file__).with_name("samples.py")))
ok, failed, suite, compare = (SAMPLES[name] for name in ("ok", "failed", "suite", "compare"))
NAME = "adapters/krona_vs_lora"
TABLE_46 = Reference(
    "Table 4.6",
    "Normalized latency and training time",
    ("Inference latency (%)", "Training time (%)"),
    {"Fine-tuning": (100, 100), "KronA": (100, 75), "Adapter": (146, None)},
)
INFO = QuestionInfo(
    NAME,
    title="KronA against LoRA",
    text="Does a higher rank buy accuracy?",
    baseline="Full fine-tuning",
    references=(TABLE_46,),
    ours={"Fine-tuning": "Full fine-tuning", "KronA": "KronA (24, 16)"},
)


def section(results: list[Result], info: QuestionInfo = INFO) -> sections.Section:
    (only,) = sections.make_sections(results, {NAME: info})
    return only


def row(results: list[Result], variant: str) -> dict[str, tables.Cell]:
    """Cells of a variant's row by head."""
    table = tables.results_table(section(results))
    found = next(cells for cells in table.rows if cells[0].text == variant)
    return dict(zip(table.heads, found, strict=False))


def test_student_quantiles_are_scipys() -> None:
    exact = [round(float(stats.t.ppf(0.975, degrees)), 3) for degrees in range(1, 31)]
    assert list(sections.STUDENT) == exact


def test_score_of_several_seeds() -> None:
    assert sections.combine_score([70.0]) == (70.0, None, None)
    assert sections.combine_score([70.0, 72.0]) == (71.0, 70.0, 72.0)
    mean, low, high = sections.combine_score([70.0, 71.0, 72.0])
    assert mean == 71.0
    assert high == pytest.approx(71 + 4.303 / math.sqrt(3), abs=1e-9)  # standard deviation 1
    assert low == pytest.approx(71 - 4.303 / math.sqrt(3), abs=1e-9)
    many = [float(i % 7) for i in range(50)]
    half = sections.combine_score(many)[2] - sections.combine_score(many)[0]
    assert half == pytest.approx(stats.t.ppf(0.975, 49) * stats.sem(many), rel=2e-3)


def test_ratios_of_several_seeds_are_combined_conservatively() -> None:
    both = sections.combine_ratio([compare("x", 0.8, 0.05), compare("x", 0.9, 0.05)])
    assert both.ratio == pytest.approx(math.sqrt(0.72))
    assert (both.low, both.high, both.verdict) == (0.75, pytest.approx(0.95), "better")
    split = sections.combine_ratio([compare("x", 0.9, 0.05), compare("x", 0.98, 0.05)])
    assert split.verdict == "inconclusive"


def test_a_row_by_hand() -> None:
    cells = row(suite(3), "KronA (24, 16)")
    # accuracies 68.4, 68.8, 69.2: standard deviation 0.4, half width 4.303 * 0.4 / sqrt(3) = 0.99
    assert cells["Accuracy (%)"].text == "68.8 ± 1.0"
    assert cells["Variant"].spread == "3 seeds"
    assert cells["Trainable parameters"] == tables.Cell("17,001", spread="0.0749 %")
    latency = cells["Latency, batch 1 (ms)"]
    # latencies 4.008, 4.028, 4.048, each with p10 = 0.97 and p90 = 1.06 of it
    assert (latency.text, latency.spread) == ("4.03", "3.91–4.27")
    # ratios 1.002, 1.003, 1.004, each ± 0.01
    assert latency.ratio == "×1.003 [0.992, 1.014]"
    assert latency.verdict == "inconclusive"
    step = cells["Training step (ms)"]
    assert (step.text, step.ratio, step.verdict) == ("139", "×0.764 [0.754, 0.774]", "better")
    assert cells["Training peak memory (MiB)"].text == "708"
    assert cells["Inference peak memory (MiB)"].text == "513"
    assert "Weights (MiB)" not in cells  # equal for all


def test_the_baseline_comes_first_and_is_marked() -> None:
    table = tables.results_table(section(list(reversed(suite(1)))))
    assert table.rows[0][0] == tables.Cell("Full fine-tuning", spread="1 seed", mark="baseline")


def test_one_and_two_seeds_say_what_their_interval_is() -> None:
    assert row(suite(1), "LoRA r=1")["Accuracy (%)"] == tables.Cell("67.5")
    assert row(suite(2), "LoRA r=1")["Accuracy (%)"] == tables.Cell("67.7", spread="67.5–67.9")
    assert "one seed (0)" in section(suite(1)).facts


def test_failed_seeds_are_counted_and_failed_variants_keep_their_row() -> None:
    results = [*suite(3), failed("LoRA r=1", "out of memory", 3), failed("KronA (7, 5)", "7 does not divide 384")]
    assert row(results, "LoRA r=1")["Variant"].spread == "3 of 4 seeds"
    assert row(results, "KronA (7, 5)")["Accuracy (%)"] == tables.Cell("7 does not divide 384", mark="failed")


def test_a_run_that_knew_no_machine_joins_the_section_that_it_fits() -> None:
    early = dataclasses.replace(failed("KronA (7, 5)", "refused"), machine={})
    assert len(sections.make_sections([early, *suite(1)], {})) == 1
    other = dataclasses.replace(ok("LoRA r=1", 5), machine={"cpu": "Another CPU"})
    assert len(sections.make_sections([early, *suite(1), other], {})) == 2


def test_other_targets_and_data_have_sections_of_their_own() -> None:
    tpu = failed("LoRA r=1", "no TPU", status="unsupported", target="tpu")
    other = dataclasses.replace(ok("LoRA r=1"), data={"corpus": "another"})
    slugs = [part.slug for part in sections.make_sections([*suite(1), tpu], {})]
    assert slugs == ["adapters-krona-vs-lora", "adapters-krona-vs-lora-smoke-tpu"]
    slugs = [part.slug for part in sections.make_sections([*suite(1), other], {})]
    assert slugs == ["adapters-krona-vs-lora-smoke-xeon", "adapters-krona-vs-lora-smoke-xeon-2"]


def test_a_rival_beside_the_baseline_has_a_line_and_leaves_the_ratio_alone() -> None:
    [section] = sections.make_sections(suite(1), {})
    assert tables.rivalries(section) == [
        "train step: KronA (24, 16) against LoRA r=1 ×1.030 [1.020, 1.040], higher",
    ]
    krona = next(r for r in section.rows if r.variant == "KronA (24, 16)")
    assert krona.ratios["train_step_ms"].baseline == "Full fine-tuning"


def test_the_score_is_the_one_that_the_result_names() -> None:
    result = dataclasses.replace(
        ok("LoRA r=1"),
        metric="matthews",
        measurements=(
            Measurement(name="train_step_ms", value=1.0, unit="ms"),
            Measurement(name="matthews", value=62.13, unit="%"),
        ),
    )
    assert sections.find_metric([result]) == "matthews"
    assert row([result], "LoRA r=1")["Matthews (%)"].text == "62.1"


def test_compiled_figures_and_synthetic_data_are_marked() -> None:
    compiled = dataclasses.replace(
        ok("LoRA r=1"),
        measurements=(Measurement(name="latency_ms.batch1", value=2.0, unit="ms", kind="compiled"),),
        data={"synthetic": "associative recall"},
    )
    assert row([compiled], "LoRA r=1")["Latency, batch 1 (ms)"].mark == "compiled"
    assert "synthetic data: associative recall" in section([compiled]).facts


def test_the_papers_table_stands_beside_ours() -> None:
    table = tables.reference_table(section(suite(3)), TABLE_46)
    assert table.heads[:3] == ("Method", "Inference latency (%)", "Training time (%)")
    tuning, krona, adapter = (dict(zip(table.heads, cells, strict=True)) for cells in table.rows)
    assert (krona["Training time (%)"].text, krona["Ours: train step ×"].text) == ("75", "0.764")
    assert krona["Method"] == tables.Cell("KronA", spread="KronA (24, 16)")
    assert krona["Ours: accuracy"].text == "68.8 ± 1.0"
    assert (tuning["Ours: train step ×"].text, tuning["Ours: train step ×"].spread) == ("1", "baseline")
    assert (adapter["Training time (%)"].text, adapter["Ours: accuracy"].text) == ("–", "–")


def test_numbers() -> None:
    shown = [wording.number(value) for value in (1234567.0, 100.4, 99.96, 99.94, 10.04, 9.996, 1.234, 0.01234, 5.0)]
    assert shown == ["1,234,567", "100", "100", "99.9", "10.0", "10.0", "1.23", "0.0123", "5"]
    assert wording.number(71.26, "%") == "71.3"


class Page(HTMLParser):
    """Collects tags and text, and every address that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        wanted = [value or "" for name, value in attrs if name in ("src", "srcset", "data", "poster")]
        self.loads += wanted + ([str(dict(attrs).get("href"))] if tag == "link" else [])

    def handle_data(self, data: str) -> None:
        self.text += data


def test_files_and_the_page(tmp_path: Path) -> None:
    results = [*suite(3), failed("KronA (7, 5)", "7 does not divide 384")]
    path = report.write_report(results, {NAME: INFO}, tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    names = {file.name for file in path.parent.iterdir()}
    stem = "adapters-krona-vs-lora"
    kinds = ("pareto.svg", "pareto.png", "pareto.csv", "curves.svg", "curves.png", "curves.csv")
    assert names == {"report.html", "report.md", *(f"{stem}-{kind}" for kind in kinds)}
    text = path.read_text()
    page = Page(text)
    assert page.tags.count("svg") == 4  # three fronts and the curves
    assert not page.loads
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    for part in (
        "Platinum 8481C",
        "68.8 ± 1.0",
        "×0.764 [0.754, 0.774]",
        "7 does not divide 384",
        "Table 4.6",
        "11.0 %",
    ):
        assert part in page.text
    assert "no difference, as it should" in page.text  # the A/A control


def test_the_markdown(tmp_path: Path) -> None:
    report.write_report(suite(3), {NAME: INFO}, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| Variant |"))
    assert {line.count("|") for line in lines[head : head + 6]} == {9}
    assert "| Full fine-tuning (baseline) <small>3 seeds</small> | 71.2 ± 1.0 |" in lines[head + 2]
    assert "![Pareto front: KronA against LoRA](adapters-krona-vs-lora-pareto.svg)" in lines
    assert lines[head - 2].startswith("**Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz · 2 cores**")


def test_the_csv_has_every_figure_unrounded(tmp_path: Path) -> None:
    report.write_report(suite(3), {NAME: INFO}, tmp_path)
    with open(tmp_path / "adapters-krona-vs-lora-pareto.csv", newline="") as file:
        rows = {line["variant"]: line for line in csv.DictReader(file)}
    krona = rows["KronA (24, 16)"]
    assert float(krona["accuracy"]) == pytest.approx(68.8)
    assert float(krona["ratio.train_step_ms"]) == pytest.approx(139 / 182)
    assert (krona["seeds_ok"], krona["status"], krona["ratio.latency_ms.batch1.verdict"]) == ("3", "ok", "inconclusive")
    assert rows["Full fine-tuning"]["front"] == "True"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|\"'[x](javascript:alert(2)) $\\frac$"
    bad = dataclasses.replace(
        ok("LoRA r=1"),
        spec=SAMPLES["spec"](evil, 1),
        machine={"cpu": evil},
        context={"commit": evil, evil: evil},
        data={evil: evil},
        paper={"title": evil, "authors": evil, "year": 1, "url": "javascript:alert(3)"},
    )
    worse = dataclasses.replace(failed(evil, evil), machine={"cpu": evil})
    reference = Reference(evil, evil, (evil,), {evil: (evil,)}, evil)
    info = QuestionInfo(NAME, evil, evil, evil, (reference,), {evil: evil})
    path = report.write_report([bad, worse], {NAME: info}, tmp_path)
    page = Page(path.read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "javascript:alert(3)" not in path.read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("| &lt;script")]
    assert tables
    assert all(file.parent == tmp_path for file in tmp_path.iterdir())


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results to report on: run `pareto bench` first"):
        report.write_report([], {}, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_report_of_failures_alone(tmp_path: Path) -> None:
    path = report.write_report([failed("LoRA r=1", "it broke")], {NAME: INFO}, tmp_path)
    assert "it broke" in path.read_text()
    assert not list(tmp_path.glob("*.svg"))


def shown(results: list[Result]) -> str:
    console = Console(width=170, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.terminal_table(results))
    return console.export_text()


def test_the_terminal_table() -> None:
    text = shown([*suite(3), failed("[bold]x[/]", "it broke [/red]")])
    line = next(line for line in text.splitlines() if "KronA (24, 16)" in line)
    assert " ".join(line.split()) == "KronA (24, 16) 68.8 ± 1.0 0.0749 % 4.03 ×1.003 ≈ 139 ×0.764 ▲ 708"
    assert "[bold]x[/] failed: it broke [/red]" in text
    assert "Platinum 8481C" in text
    assert "No results" in shown([])


def test_the_front_of_the_first_figure() -> None:
    values: list[Any] = report.front_names(section(suite(3)))
    assert values == ["Full fine-tuning"]  # as fast as the others, and the most accurate


def test_training_curves_are_averaged_over_steps_and_seeds() -> None:
    def curve(seed: int) -> tuple[tuple[int, float], ...]:
        return tuple((step, float(step // 8) + seed + (0.5 if step % 2 else -0.5)) for step in range(24))

    results = [dataclasses.replace(ok("BitFit", seed), curve=curve(seed)) for seed in (0, 1)]
    (line,) = report.curve_lines(section(results))
    assert line.mean == (0.5, 1.5, 2.5)
    assert (line.low, line.high) == ((0.0, 1.0, 2.0), (1.0, 2.0, 3.0))
    assert line.steps == (4.0, 12.0, 20.0)
