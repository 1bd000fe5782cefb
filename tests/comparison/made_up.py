"""A comparison that never was, with numbers that are easy to follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from uoe_parallel.comparison.results import Comparison, Point, Result, Run
from uoe_parallel.comparison.settings import ComparisonConfig

STEPS = (0, 10, 20, 40, 80)
NOISE = (0.0, 0.01, -0.01, 0.02)
"""Of a seed, for every contender alike."""


def run(
    seed: int, loss: float, steps: int, flops_per_token: float, kinds: Sequence[str] = ()
) -> Run:
    """With a curve whose loss falls evenly in the logarithm of steps and ends at `loss`, held out
    and in validation; 100 tokens a step."""
    curve = []
    for share in STEPS:
        step = share * steps // STEPS[-1]
        height = 5.0 if step == 0 else loss + 0.5 * math.log(steps / step)
        curve.append(Point(step, 100 * step, 100 * step * flops_per_token, height))
    return Run(
        seed=seed,
        curve=curve,
        loss=loss,
        accuracy=1 - loss / 10,
        bits_per_byte=loss / math.log(2),
        seconds_per_step=0.1 + flops_per_token / 1e8,
        peak_memory=2**30,
        load_max_over_mean=1.5 if kinds else None,
        load_entropy=0.9 if kinds else None,
        experts_per_token=dict.fromkeys(kinds, 4.0),
        dropped_share=0.0 if kinds else None,
    )


def result(
    name: str,
    losses: Sequence[float],
    *,
    steps: int = 80,
    flops_per_token: float = 1e6,
    kinds: Sequence[str] = (),
) -> Result:
    """Of a contender with a run for each of `losses`."""
    return Result(
        name=name,
        about=f"{name}, made up",
        parameters=1_000_000,
        active_parameters=600_000,
        flops_per_token=flops_per_token,
        steps=steps,
        tokens=100 * steps,
        learning_rate=2e-3,
        sweep={1e-3: 2.0, 2e-3: 1.9, 4e-3: 2.1},
        sweep_flops=1e9,
        runs=[
            run(number + 1, loss, steps, flops_per_token, kinds)
            for number, loss in enumerate(losses)
        ],
    )


def with_noise(loss: float, *own: float) -> list[float]:
    """One loss for each of `own`, which is what the seed does to this contender alone."""
    return [loss + shared + more for shared, more in zip(NOISE, own, strict=False)]


def diverged(found: Result, seed: int) -> Result:
    """With the run of `seed` stopped by an infinite loss after half of its steps."""
    runs = [
        replace(run, curve=run.curve[:-1], loss=math.inf, accuracy=math.nan, bits_per_byte=None)
        if run.seed == seed
        else run
        for run in found.runs
    ]
    return replace(found, runs=runs)


def comparison(
    results: Sequence[Result],
    *,
    baselines: Sequence[str] = ("dense",),
    others: Sequence[str] = (),
    task: str = "next_token",
    jobs: int = 1,
    fields: Mapping[str, Any] | None = None,
) -> Comparison:
    """others: contenders that have no results."""
    tree: dict[str, Any] = {
        "folder": "unused",
        "seeds": len(results[0].runs),
        "learning_rates": [1e-3, 2e-3, 4e-3],
        "baselines": list(baselines),
        "run": {},
        "contenders": {name: {} for name in [*(r.name for r in results), *others]},
    }
    config = ComparisonConfig.model_validate(tree | dict(fields or {}))
    return Comparison(config=config, task=task, jobs=jobs, results=list(results))


def three() -> Comparison:
    """dense; better, which is lower by 0.1 give or take 0.01 at half the FLOPs a token; alike, of
    which that can't be said."""
    return comparison(
        [
            result("dense", with_noise(2.0, 0, 0, 0)),
            result(
                "better",
                with_noise(1.9, 0, 0.01, -0.01),
                steps=160,
                flops_per_token=5e5,
                kinds=["feed_forward"],
            ),
            result("alike", with_noise(2.01, 0.02, -0.03, 0.01), kinds=["attention"]),
        ]
    )
