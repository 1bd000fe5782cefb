"""What the data of a comparison support and what they don't, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from uoe_parallel.comparison.findings import LOSS, Findings, Measure, Pair
from uoe_parallel.comparison.statistics import CONFIDENCE, spread
from uoe_parallel.comparison.tables import in_short, seconds_per_step, signed

TOKENS_PER_PARAMETER = 20
"""Where a dense model is about as well trained as its FLOPs allow (arXiv 2203.15556)."""

_BUDGETS = {
    "flops": "as many floating-point operations",
    "tokens": "as many tokens",
    "time": "as many seconds of training steps",
}


@dataclass(frozen=True)
class Words:
    """Sentences, those of a list of which each stands by itself."""

    terms: str
    """What was held equal."""
    short: list[str]
    """Who came out where, beside each baseline."""
    details: list[str]
    """By how much, of each contender. Numbers in brackets are intervals of `CONFIDENCE`."""
    cautions: list[str]
    """What the data don't say."""


def words(findings: Findings) -> Words:
    """Everything that there is to say of at least one result."""
    return Words(
        terms=_terms(findings),
        short=[_verdicts(findings, baseline) for baseline in _judged_by(findings)],
        details=[_details(findings, name) for name in findings.results if _pairs(findings, name)],
        cautions=list(_cautions(findings)),
    )


def _terms(findings: Findings) -> str:
    config = findings.comparison.config
    first = config.baselines[0]
    measure = findings.measures[0]
    best = "higher" if measure.higher_is_better else "lower"
    tried = len(config.learning_rates)
    rate = (
        "the same learning rate"
        if tried == 1
        else f"the best of {tried} learning rates that each was tried with for "
        f"{_percent(config.sweep_share)} of the budget"
    )
    return (
        f"Every contender trained with {_BUDGETS[config.budget]} as {first}, on the same data in "
        f"the same order, with {_many(config.seeds, 'seed')}, at {rate}. They are judged by "
        f"held-out {measure.name}, of which {best} is better."
    )


def _judged_by(findings: Findings) -> list[str]:
    return [b for b in findings.baselines if any(p.baseline == b for p in _main(findings))]


def _main(findings: Findings) -> list[Pair]:
    """Of the measure that contenders are judged by."""
    return [p for p in findings.pairs if p.measure is findings.measures[0]]


def _pairs(findings: Findings, contender: str) -> list[Pair]:
    return [pair for pair in findings.pairs if pair.contender == contender]


def _verdicts(findings: Findings, baseline: str) -> str:
    pairs = [pair for pair in _main(findings) if pair.baseline == baseline]
    by_verdict: dict[str, list[str]] = {}
    for pair in pairs:
        by_verdict.setdefault(_verdict(pair), []).append(pair.contender)
    order = ("better", "worse", "not told apart", "compared by one run only", "not compared")
    told = "; ".join(f"{v}: {', '.join(by_verdict[v])}" for v in order if v in by_verdict)
    return f"Beside {baseline}, {told}."


def _verdict(pair: Pair) -> str:
    difference = pair.difference
    if difference.mean is None:
        return "not compared"
    if difference.interval is None:
        return "compared by one run only"
    if not difference.is_told_apart:
        return "not told apart"
    return "better" if (difference.mean > 0) == pair.measure.higher_is_better else "worse"


def _details(findings: Findings, contender: str) -> str:
    if lost := findings.held_out["loss"][contender].not_finite:
        runs = len(findings.results[contender].runs)
        return f"{contender}: not compared, as it has {_no_loss(lost, runs)}."
    told = []
    for measure in findings.measures:
        pairs = (p for p in _pairs(findings, contender) if p.measure is measure)
        told.append(f"{measure.name} {'; '.join(_compared(findings, pair) for pair in pairs)}.")
    return f"{contender}: {' '.join(told)}"


def _compared(findings: Findings, pair: Pair) -> str:
    """`lower than dense's by 0.0310 nats (1.8 %; 0.0120 to 0.0500)`"""
    difference, measure = pair.difference, pair.measure
    if difference.mean is None:
        return f"not compared with {pair.baseline}'s, which is not finite in every run"
    if not any(difference.values):
        return f"the same as {pair.baseline}'s with every seed"
    side = "higher" if difference.mean > 0 else "lower"
    size = f"{_size(difference.mean, measure)} {measure.unit}"
    base = findings.held_out[measure.name][pair.baseline].mean
    relative = f"{_percent(abs(difference.mean / base), 1)}; " if base and measure is LOSS else ""
    if difference.interval is None:
        return f"{side} than {pair.baseline}'s by {size} ({relative}may be chance)"
    if not difference.is_told_apart:
        low, high = (signed(end, measure) for end in difference.interval)
        return (
            f"not told apart from {pair.baseline}'s: {signed(difference.mean, measure)} "
            f"{measure.unit} ({low} to {high})"
        )
    near, far = sorted(abs(end) for end in difference.interval)
    return (
        f"{side} than {pair.baseline}'s by {size} ({relative}{_size(near, measure)} to "
        f"{_size(far, measure)})"
    )


def _no_loss(count: int, runs: int) -> str:
    return f"no finite loss in {count} of {_many(runs, 'run')}"


def _size(value: float, measure: Measure) -> str:
    return signed(abs(value), measure).removeprefix("+")


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _cautions(findings: Findings) -> Iterator[str]:
    if findings.missing:
        yield f"Left out, as not all of their runs are over: {', '.join(findings.missing)}."
    for name, found in findings.held_out["loss"].items():
        if found.not_finite:
            yield (
                f"{name} has {_no_loss(found.not_finite, len(found.values))}. It gets no mean: one "
                "over the other runs would hide that."
            )
    yield from _of_chance(findings)
    yield from _of_tuning(findings)
    yield from _of_the_budget(findings)
    yield from _of_size(findings)
    yield from _of_time(findings)


def _of_chance(findings: Findings) -> Iterator[str]:
    seeds = findings.comparison.config.seeds
    if seeds == 1:
        yield "One seed: nothing here says which differences are more than chance."
        return
    if seeds <= 4:
        yield (
            f"With {seeds} seeds an interval has {_many(seeds - 1, 'degree')} of freedom. It is "
            "wide, it takes differences between seeds for normally distributed, and who can't be "
            "told apart need not be equal."
        )
    yield (
        "Intervals are of other seeds, that is first weights and orders of the data. Another "
        "corpus or another part to hold out is one thing more that they don't cover."
    )
    told = [p.difference for p in findings.pairs] + [
        difference for found in findings.at_equal for difference in found.differences.values()
    ]
    intervals = sum(difference.interval is not None for difference in told)
    if intervals < 2:
        return
    main = [pair for pair in _main(findings) if pair.difference.p_value is not None]
    level = (1 - CONFIDENCE) / max(len(main), 1)
    left = [f"{p.contender} beside {p.baseline}" for p in main if _is_below(p, level)]
    yield (
        f"There are {intervals} intervals of {_percent(CONFIDENCE)}: about "
        f"{(1 - CONFIDENCE) * intervals:.1g} of them are expected to miss the truth by chance "
        f"alone. If the {len(main)} of held-out {findings.measures[0].name} are to hold all at "
        f"once (Bonferroni), {_listed(left) or 'none'} {_verb(left)} still told apart."
    )


def _is_below(pair: Pair, level: float) -> bool:
    return pair.difference.p_value is not None and pair.difference.p_value < level


def _of_tuning(findings: Findings) -> Iterator[str]:
    config = findings.comparison.config
    if len(config.learning_rates) == 1:
        yield "One learning rate was tried, so none of the contenders was tuned."
        return
    for end, pick in (("lowest", min), ("highest", max)):
        names = [
            name
            for name, result in findings.results.items()
            if result.learning_rate == pick(result.sweep)
        ]
        if names:
            yield (
                f"The best learning rate of {_listed(names)} is the {end} of those tried: a better "
                "one may lie beyond."
            )
    lost = [
        f"{name} at {rate:.3g}"
        for name, result in findings.results.items()
        for rate, loss in result.sweep.items()
        if not math.isfinite(loss)
    ]
    if lost:
        yield f"Tries of learning rates that came to no finite loss: {', '.join(lost)}."
    if config.sweep_share < 1:
        yield (
            f"Learning rates were chosen by one run of {_percent(config.sweep_share)} of the "
            "budget each; the best one of a whole run may be another."
        )


def _of_the_budget(findings: Findings) -> Iterator[str]:
    results = list(findings.results.values())
    budget = findings.comparison.config.budget
    for quantity, unit, values in (
        ("tokens", "tokens", [(float(r.tokens), r.name) for r in results]),
        ("flops", "FLOPs", [(r.tokens * r.flops_per_token, r.name) for r in results]),
    ):
        (few, fewest), (many, most) = min(values), max(values)
        if quantity != budget and many > 1.01 * few:
            yield (
                f"Under this budget runs differ in {unit}: from {in_short(few)} of {fewest} to "
                f"{in_short(many)} of {most}."
            )


def _of_size(findings: Findings) -> Iterator[str]:
    ratios = spread([r.tokens / r.parameters for r in findings.results.values()])
    assert ratios.smallest is not None
    assert ratios.largest is not None
    if ratios.smallest >= TOKENS_PER_PARAMETER:
        return
    few, many = f"{ratios.smallest:.2g}", f"{ratios.largest:.2g}"
    yield (
        f"Runs saw {few if few == many else f'{few} to {many}'} tokens for each parameter, where "
        f"about {TOKENS_PER_PARAMETER} make good use of a dense model's FLOPs (arXiv 2203.15556): "
        "they show how contenders begin, and not where long training or other sizes take them."
    )


def _of_time(findings: Findings) -> Iterator[str]:
    reference = findings.reference
    timed = [r for r in findings.results.values() if math.isfinite(seconds_per_step(r))]
    others = [r for r in timed if r is not reference]
    if others and reference in timed:
        time = [seconds_per_step(r) / seconds_per_step(reference) for r in others]
        flops = [r.flops_per_token / reference.flops_per_token for r in others]
        yield (
            f"FLOPs are those that a model needs, and not time: on this machine a step took "
            f"{_range(time)} times as long as {reference.name}'s, at {_range(flops)} times its "
            "FLOPs."
        )
    jobs = findings.comparison.jobs
    if jobs > 1:
        yield (
            f"{jobs} runs at once shared the machine, so times are rough"
            + (", and so is this budget" if findings.comparison.config.budget == "time" else "")
            + "."
        )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _verb(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"
