"""Routing from its definitions: one document at a time, token by token, slow and obvious.

A document is what its tokens score: a list of vectors for each level. Nothing of the package is
used but the names of its config.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from uoe_parallel.config.schema import RoutingConfig

Vector = list[float]
Scores = Sequence[Vector]


def mean(rows: Scores) -> Vector:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def best(scores: Vector, among: Sequence[int], k: int) -> list[int]:
    return sorted(among, key=lambda i: (-scores[i], i))[:k]


def gate(name: str, scores: Vector, chosen: Sequence[int]) -> Vector:
    n = len(scores)
    if name == "sigmoid":
        return [2 / (1 + math.exp(-s)) for s in scores]
    if name == "relu":
        return [max(0.0, 1 + s) for s in scores]
    if name == "softmax":
        total = sum(math.exp(s) for s in scores)
        return [n * math.exp(s) / total for s in scores]
    assert name == "softmax_of_chosen"
    total = sum(math.exp(scores[i]) for i in chosen) or 1.0
    return [len(chosen) * math.exp(s) / total if i in chosen else 0.0 for i, s in enumerate(scores)]


def units(length: int, size: int) -> list[range]:
    """The tokens of each unit of a document."""
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def route(
    fine: Scores | None,
    coarse: Scores | None,
    config: RoutingConfig,
    *,
    causal: bool,
    context: int,
    thresholds: Vector | None = None,
    bias: Vector | None = None,
) -> tuple[list[list[bool]], list[Vector], int]:
    """Which experts each token of a document visits, its gates, and how many of its (token, expert)
    pairs were dropped. Shared experts aside."""
    some = fine if fine is not None else coarse
    assert some is not None
    length, n = len(some), len(some[0])
    bias = bias or [0.0] * n
    allowed: list[list[int]] = [list(range(n))] * length
    gates = [[1.0] * n for _ in range(length)]
    if coarse is not None:
        assert config.segment_length is not None and config.segment_experts is not None
        runs = units(length, config.segment_length)
        for number, run in enumerate(runs):
            if causal and number == 0:
                continue
            summary = mean([coarse[t] for t in (runs[number - 1] if causal else run)])
            kept = best(summary, range(n), config.segment_experts)
            for t in run:
                allowed[t] = kept
                gates[t] = gate(config.gate, summary, kept)
    if fine is None:
        return [[i in kept for i in range(n)] for kept in allowed], gates, 0
    runs = units(length, config.patch_length)
    summaries = [fine[run[0]] if causal else mean([fine[t] for t in run]) for run in runs]
    chosen = _choose(config, summaries, [allowed[run[0]] for run in runs], thresholds, bias)
    limit = length
    if config.capacity_factor is not None:
        whole = math.ceil(context / config.patch_length)
        limit = math.ceil(Fraction(str(config.capacity_factor)) * config.top_k * whole / n)
    taken = [0] * n
    masks, dropped = [[False] * n for _ in range(length)], 0
    for run, summary, choice in zip(runs, summaries, chosen, strict=True):
        visited = []
        for i in choice:
            taken[i] += 1
            if taken[i] <= limit:
                visited.append(i)
            else:
                dropped += len(run)
        own = gate(config.gate, summary, visited)
        for t in run:
            masks[t] = [i in visited for i in range(n)]
            gates[t] = [g * o for g, o in zip(gates[t], own, strict=True)]
    return masks, gates, dropped


def _choose(
    config: RoutingConfig,
    summaries: Scores,
    allowed: Sequence[Sequence[int]],
    thresholds: Vector | None,
    bias: Vector,
) -> list[list[int]]:
    n = len(summaries[0])
    if config.selection == "threshold":
        assert thresholds is not None
        return [
            [i for i in among if scores[i] > thresholds[i]]
            for scores, among in zip(summaries, allowed, strict=True)
        ]
    if config.selection == "expert_choice":
        share = math.ceil(config.top_k * len(summaries) / n)
        takers: list[list[int]] = [[] for _ in summaries]
        for i in range(n):
            eligible = [u for u, among in enumerate(allowed) if i in among]
            for u in sorted(eligible, key=lambda u: (-summaries[u][i], u))[:share]:
                takers[u].append(i)
        return takers
    assert config.selection == "top_k"
    return [
        best([s + b for s, b in zip(scores, bias, strict=True)], among, config.top_k)
        for scores, among in zip(summaries, allowed, strict=True)
    ]
