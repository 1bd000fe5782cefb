"""A comparison for people, on a terminal and as Markdown with pictures, and as JSON."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uoe_parallel.comparison.curves import write_curves
from uoe_parallel.comparison.findings import Findings, find, findings_as_json
from uoe_parallel.comparison.results import Comparison
from uoe_parallel.comparison.tables import as_markdown, as_rich, tables
from uoe_parallel.comparison.words import words
from uoe_parallel.config.json_text import write_json
from uoe_parallel.errors import UserError

_PICTURES = {
    "loss_by_flops.png": "Validation loss over training FLOPs",
    "loss_by_tokens.png": "Validation loss over training tokens",
    "differences.png": "Differences to the first baseline",
}


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write report.json, report.md and three PNG files into `folder`, which is made; their paths.

    comparison: with at least one result. Raises UserError where there is no place for them.
    """
    findings = find(comparison)
    told, page = folder / "report.json", folder / "report.md"
    write_json(told, findings_as_json(findings) | {"words": _sentences(findings)}, option="folder")
    try:
        page.write_text(report_as_markdown(findings), encoding="utf-8")
        return [told, page, *write_curves(findings, folder)]
    except OSError as error:
        raise UserError(
            f"folder: the report cannot be written to {folder}: {error.strerror}"
        ) from None


def print_report(comparison: Comparison, console: Console) -> None:
    """Tables and words. comparison: with at least one result."""
    findings = find(comparison)
    for table in tables(findings):
        console.print(as_rich(table))
        console.print(Text(table.note, style="dim"))
        console.print()
    for heading, sentences in _sentences(findings).items():
        console.print(Text(heading, style="bold"))
        bullets = Table.grid(padding=(0, 1))
        for sentence in sentences:
            bullets.add_row("-", Text(sentence))
        console.print(bullets)
        console.print()


def report_as_markdown(findings: Findings) -> str:
    """Words first, then the tables, then the pictures, which lie beside the page."""
    lines = []
    for heading, sentences in _sentences(findings).items():
        lines += [f"### {heading}", "", *(f"- {sentence}" for sentence in sentences), ""]
    for table in tables(findings):
        lines += as_markdown(table)
    for name, title in _PICTURES.items():
        lines += [f"![{title}]({name})", ""]
    return "\n".join(lines)


def _sentences(findings: Findings) -> dict[str, list[str]]:
    """By heading; headings without any are left out."""
    told, seeds = words(findings), findings.comparison.config.seeds
    differences = "Differences of one seed"
    if seeds > 1:
        differences = f"Mean differences over {seeds} seeds, and their 95 % intervals"
    found = {
        "In short": [told.terms, *told.short],
        differences: told.details,
        "What the data don't say": told.cautions,
    }
    return {heading: sentences for heading, sentences in found.items() if sentences}
