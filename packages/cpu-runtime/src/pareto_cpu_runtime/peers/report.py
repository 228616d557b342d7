"""The tables of the comparison, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pareto_cpu_runtime.peers.compare import LONG_PROMPT, Table, Timed, Together
from pareto_cpu_runtime.peers.compare import NEW as NEW_TOKENS
from pareto_cpu_runtime.peers.geometry import Geometry
from pareto_cpu_runtime.peers.loading import Loading


def markdown(geometry: Geometry, found: Sequence[Table | Together | Loading]) -> str:
    """Every table, one after the other."""
    lines = [
        f"# {geometry.name} with random weights, {geometry.layers} layers",
        "",
        "Medians over turns in milliseconds; a ratio is the other runtime's median over ours, with its 95 % bootstrap "
        "interval.",
        "",
    ]
    for each in found:
        rows = one(each) if isinstance(each, Table) else together(each) if isinstance(each, Together) else loading(each)
        lines += [*rows, ""]
    return "\n".join(lines)


def one(table: Table) -> list[str]:
    """One table: a row per case and runtime."""
    read, multiply = statistics.median(table.read_gb_per_s), _median(table.int8_gops)
    limits = f"read {read:.1f} GB/s" + (f", int8 {multiply:.0f} GOPS" if multiply else "")
    agreed = ", ".join(f"{name} {value:.4f}" for name, value in table.agreement.items())
    lines = [
        f"## {table.title}, {table.threads} thread{'s' * (table.threads > 1)}",
        "",
        f"Limits in the same run: {limits}. Correlation of the answers, checked first: {agreed}.",
        "",
        "| case | runtime | ms | times as fast, ours | share of the limit |",
        "|---|---|--:|--:|--:|",
    ]
    for case in table.cases:
        for name, seconds in case.seconds.items():
            ours = [other for other in case.seconds if other.startswith("ours")]
            ratios = "; ".join(f"{other.removeprefix('ours, ')}: {case.ratio(name, other)}" for other in ours)
            ratio = "" if name.startswith("ours") else ratios
            lines.append(
                f"| {case.case} | {name} | {1e3 * statistics.median(seconds):.2f} | {ratio} | "
                f"{share(case, name, read, multiply)} |"
            )
    return lines


def together(found: Together) -> list[str]:
    """Requests at a time: a row per runtime and count."""
    lines = [
        f"## requests together, {found.threads} thread{'s' * (found.threads > 1)}",
        "",
        f"{found.prompt} tokens in, {found.new} out for each; throughput against one request alone, whole and from the "
        "first tokens on.",
        "",
        "| runtime | requests | first tokens, ms | a step, ms | tokens per second | throughput | of steps |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, counts in found.seconds.items():
        for count, turns in counts.items():
            first, rest, whole = (statistics.median(times) for times in (*zip(*turns, strict=True), map(sum, turns)))
            ratios = (found.throughput(name, count), found.throughput_of_steps(name, count)) if count > 1 else ("", "")
            lines.append(
                f"| {name} | {count} | {1e3 * first:.1f} | {1e3 * rest / (found.new - 1):.2f} | "
                f"{count * found.new / whole:.1f} | {ratios[0]} | {ratios[1]} |"
            )
    return lines


def loading(found: Loading) -> list[str]:
    """A row per way to load."""
    lines = [
        f"## loading, {found.threads} thread{'s' * (found.threads > 1)}",
        "",
        "The file warm, libraries imported. Peaks above what the process held, cache taken off, over the weights' "
        f"bytes; {NEW_TOKENS} tokens generated from {LONG_PROMPT}. Seconds: median and extremes.",
        "",
        "| group | file | weights, MiB | load, s | peak of loading | peak of generating |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for case in found.cases:
        seconds = [run["seconds"] for run in case.runs]
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        peaks = f"{case.peak('loading'):.2f} | {case.peak('generating'):.2f}"
        lines.append(f"| {case.group} | {case.memory} | {case.runs[0]['weights'] / 2**20:.0f} | {spread} | {peaks} |")
    return lines


def share(case: Timed, name: str, read: float, multiply: float) -> str:
    """Of the bandwidth where weights are read once per row, of int8 arithmetic where many rows share them."""
    seconds = statistics.median(case.seconds[name])
    if case.case in ("next token", "1 rows"):
        size = case.gigabytes.get(name)
        return f"{size / seconds / read:.0%} of reading" if size else ""
    return f"{case.giga_operations / seconds / multiply:.0%} of int8" if multiply and case.giga_operations else ""


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
