"""What a comparison is going to take, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from uoe_parallel.analysis.report import plain_table
from uoe_parallel.comparison.contenders import Model
from uoe_parallel.comparison.plan import Plan
from uoe_parallel.comparison.settings import ComparisonConfig


def outlook(comparison: ComparisonConfig, models: Mapping[str, Model], plan: Plan) -> Table:
    """A row for each contender: sizes, cost of a token, steps of a compared run, and the FLOPs of
    all its runs with those that look for a learning rate."""
    costly = models[comparison.baselines[0]].flops_per_token
    tries, total, rows = plan.sweep(), 0.0, list[tuple[str, ...]]()
    for name, model in models.items():
        steps = plan.steps(name) * comparison.seeds
        steps += sum(t.config.training.steps for t in tries if t.contender == name)
        config = model.config
        tokens = steps * config.training.global_batch_size * config.model.sequence_length
        total += tokens * model.flops_per_token
        rows.append(
            (
                name,
                f"{model.parameters.total:,}",
                f"{model.parameters.active:,}",
                f"{model.flops_per_token / costly:.3f}",
                f"{config.model.ffn_size:,}",
                f"{plan.steps(name):,}",
                f"{tokens * model.flops_per_token:.3g}",
                model.about,
            )
        )
    runs = len(models) * comparison.seeds + len(tries)
    return plain_table(
        f"{runs} runs, {total:.3g} FLOPs",
        f"contender, PARAMETERS, ACTIVE, FLOPS/TOKEN / {comparison.baselines[0].upper()}'S, "
        "FFN_SIZE, STEPS, FLOPS, what it is",
        rows,
    )
