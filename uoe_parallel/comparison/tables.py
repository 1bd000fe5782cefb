"""A comparison as tables: rows of text, for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rich.table import Table
from rich.text import Text

from uoe_parallel.analysis.report import in_bytes
from uoe_parallel.comparison.findings import Findings, Measure
from uoe_parallel.comparison.results import Result
from uoe_parallel.comparison.statistics import Difference, Spread

KINDS = {"attention": "attention", "feed_forward": "feed-forward"}
NOTHING = "-"


@dataclass(frozen=True)
class TextTable:
    """Cells as text, and below them what a reader has to know."""

    title: str
    header: list[str]
    """Columns from the second on hold numbers, but for `text_columns`."""
    rows: list[list[str]]
    note: str
    text_columns: frozenset[str] = frozenset()


def tables(findings: Findings) -> list[TextTable]:
    """All of them, in the order in which they are read."""
    makers = [_at_equal, _shares, _trained, _ran]
    held_out = [_held_out(findings, measure) for measure in findings.measures]
    return [*held_out, *(make(findings) for make in makers)]


def as_rich(table: TextTable) -> Table:
    """For a terminal, without the note."""
    made = Table(title=table.title, title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(table.header):
        is_text = number == 0 or name in table.text_columns
        made.add_column(
            Text(name),
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=number == 0,
        )
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made


def as_markdown(table: TextTable) -> list[str]:
    """Lines: a heading, the table and its note."""
    marks = [
        "---" if number == 0 or name in table.text_columns else "---:"
        for number, name in enumerate(table.header)
    ]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in [table.header, *table.rows]]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], marks, *rows[1:])]
    return [f"### {table.title}", "", *lines, "", table.note, ""]


def _held_out(findings: Findings, measure: Measure) -> TextTable:
    header = ["contender", f"{measure.name}, {_unit(measure)}"]
    spreads = findings.held_out[measure.name]
    rows = [[name, in_spread(spread, measure)] for name, spread in spreads.items()]
    if measure.name == "loss" and _has_bytes(findings):
        header.append("bits/byte")
        for row, result in zip(rows, findings.results.values(), strict=True):
            row.append(_bits(result))
    for baseline in findings.baselines:
        header.append(f"- {baseline}'s")
        for row in rows:
            pair = findings.pair(row[0], baseline, measure)
            row.append(in_interval(pair.difference, measure) if pair else NOTHING)
    runs = findings.comparison.config.seeds
    note = (
        "Mean ± standard deviation over seeds; differences are means over seeds, each seed's runs "
        "paired, with the 95 % interval by Student's t in brackets."
        if runs > 1
        else "One seed: there are no intervals."
    )
    if len(findings.baselines) > 1:
        note += " Two baselines are compared once."
    return TextTable(f"Held-out {measure.name}", header, rows, note)


def _at_equal(findings: Findings) -> TextTable:
    loss = findings.measures[-1]
    header, rows = ["contender"], [[name] for name in findings.results]
    for found in findings.at_equal:
        unit = "tokens" if found.axis == "tokens" else "FLOPs"
        header.append(f"loss at {in_short(found.at)} {unit}")
        for row in rows:
            spread = found.losses.get(row[0])
            row.append(in_spread(spread, loss) if spread else NOTHING)
        if found.differences:
            header.append(f"- {findings.reference.name}'s")
            for row in rows:
                difference = found.differences.get(row[0])
                row.append(in_interval(difference, loss) if difference else NOTHING)
    note = (
        "Validation losses in nats, at the most tokens and FLOPs that all have reached: between "
        "validations curves are taken as linear in the logarithm. A contender that is judged "
        "before its own last step has not had the end of its learning rate's decay yet, which "
        "favours those that end there."
    )
    return TextTable("At equal tokens and equal FLOPs", header, rows, note)


def _shares(findings: Findings) -> TextTable:
    header, rows = ["contender"], [[name] for name in findings.results]
    for baseline, shares in findings.share_to_reach.items():
        header.append(f"of {baseline}'s")
        for row in rows:
            share = shares[row[0]]
            row.append("never" if share is None else f"{share:.0%}")
    note = (
        "The share of a baseline's FLOPs after which a contender's mean validation curve is first "
        "at the validation loss that the baseline's ends with. Here, too, who gets there early has "
        "not had the end of its learning rate's decay."
    )
    return TextTable("FLOPs to a baseline's last loss", header, rows, note)


def _trained(findings: Findings) -> TextTable:
    reference = findings.reference
    header = [
        *("contender", "what it is", "parameters", "active", "FLOPs/token"),
        *("steps", "tokens", "tokens/parameter", "learning rate", "FLOPs with the sweep"),
    ]
    rows = [
        [
            result.name,
            result.about,
            in_short(result.parameters),
            in_short(result.active_parameters),
            f"{result.flops_per_token / reference.flops_per_token:.2f}",
            f"{result.steps:,}",
            in_short(result.tokens),
            f"{result.tokens / result.parameters:.2g}",
            _learning_rate(result),
            in_short(all_flops(result)),
        ]
        for result in findings.results.values()
    ]
    note = (
        f"FLOPs/token: forward and backward, relative to {reference.name}'s "
        f"{in_short(reference.flops_per_token)}. Steps and tokens are those of one compared run; "
        "the last column has all of a contender's runs, with those of its learning-rate sweep."
    )
    return TextTable("What was trained", header, rows, note, frozenset({"what it is"}))


def _ran(findings: Findings) -> TextTable:
    reference = seconds_per_step(findings.reference)
    header = [
        *("contender", "busiest expert", "entropy of load", "experts per token", "dropped"),
        *("time/step", "peak memory"),
    ]
    rows = [
        [
            result.name,
            _mean([run.load_max_over_mean for run in result.runs], "{:.2f}"),
            _mean([run.load_entropy for run in result.runs], "{:.3f}"),
            ", ".join(_experts(result)) or NOTHING,
            _mean([run.dropped_share for run in result.runs], "{:.2%}"),
            _mean([seconds_per_step(result) / reference], "{:.2f}"),
            in_bytes(max(run.peak_memory for run in result.runs)),
        ]
        for result in findings.results.values()
    ]
    note = (
        "Busiest expert: its load over the mean one's, in the mean routed block over the last half "
        "of a run; entropy of load: 1 is even. Experts per token come beside shared ones. "
        f"Time/step: median over runs, relative to {findings.reference.name}'s "
        f"{1e3 * reference:.3g} ms. Peak memory: of the fullest process or device."
    )
    return TextTable("How they ran", header, rows, note, frozenset({"experts per token"}))


def all_flops(result: Result) -> float:
    """Of the compared runs as planned and of the sweep."""
    return len(result.runs) * result.tokens * result.flops_per_token + result.sweep_flops


def seconds_per_step(result: Result) -> float:
    """Median over runs; NaN of runs that ended before any was timed."""
    known = [run.seconds_per_step for run in result.runs if math.isfinite(run.seconds_per_step)]
    return median(known or [math.nan])


def in_spread(spread: Spread, measure: Measure) -> str:
    """`1.7411 ± 0.0032`, or how many runs have no such number."""
    if spread.mean is None:
        return f"not finite in {spread.not_finite} of {len(spread.values)}"
    numbers = [spread.mean] if spread.deviation is None else [spread.mean, spread.deviation]
    return " ± ".join(f"{measure.scale * number:.{measure.digits}f}" for number in numbers)


def in_interval(difference: Difference, measure: Measure) -> str:
    """`-0.0310 [-0.0500, -0.0120]`"""
    if difference.mean is None:
        return NOTHING
    mean = signed(difference.mean, measure)
    if difference.interval is None:
        return mean
    return f"{mean} [{', '.join(signed(end, measure) for end in difference.interval)}]"


def signed(value: float, measure: Measure) -> str:
    """In the measure's unit."""
    return f"{measure.scale * value:+.{measure.digits}f}"


def in_short(number: float) -> str:
    """With three digits and a decimal prefix, or as a power of ten: `1.12 M`, `3.40e15`."""
    if number >= 1e13:
        digits, exponent = f"{number:.2e}".split("e")
        return f"{digits}e{int(exponent)}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def _unit(measure: Measure) -> str:
    return "%" if measure.name == "accuracy" else measure.unit


def _has_bytes(findings: Findings) -> bool:
    return any(run.bits_per_byte is not None for r in findings.results.values() for run in r.runs)


def _bits(result: Result) -> str:
    bits = [run.bits_per_byte for run in result.runs if run.bits_per_byte is not None]
    return f"{fmean(bits):.4f}" if len(bits) == len(result.runs) else NOTHING


def _learning_rate(result: Result) -> str:
    tried = sorted(result.sweep)
    rate = f"{result.learning_rate:.3g}"
    if len(tried) < 2 or result.learning_rate not in (tried[0], tried[-1]):
        return rate
    return f"{rate} ({'highest' if result.learning_rate == tried[-1] else 'lowest'})"


def _experts(result: Result) -> Iterator[str]:
    for kind, name in KINDS.items():
        by_run = (run.experts_per_token.get(kind) for run in result.runs)
        counts = [count for count in by_run if count is not None]
        if counts:
            yield f"{name} {fmean(counts):.2f}"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return form.format(fmean(known)) if known else NOTHING
