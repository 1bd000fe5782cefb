"""From the config of a run to that of one whose numbers are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from uoe_parallel.config.checks import RULES
from uoe_parallel.config.faults import report, show
from uoe_parallel.config.schema import (
    ExpertProducts,
    ParallelConfig,
    Precision,
    RoutedLayers,
    RoutesConfig,
    RoutingConfig,
    RunConfig,
    Section,
    TrainingConfig,
)
from uoe_parallel.errors import UserError

SHORT_SEQUENCE = 32
"""Tokens that a shrunk sequence has, or a few more."""
SMALL_BATCH = 8
"""Sequences that a shrunk global batch has, or a few more."""
SMALL_MICRO_BATCH = 2
"""Sequences of a shrunk micro-batch, so that a step takes several of them."""
FEW_LAYERS = 2

S = TypeVar("S", bound=Section)


def comparable(config: RunConfig, *, steps: int, precision: Precision) -> RunConfig:
    """`config` for a run of `steps` steps that leaves what a comparison reads, and nothing else.

    Without dropout, which draws other numbers under another layout. The warm-up is cut to the
    number of steps, that of thresholds to one. Raises UserError if the result breaks a rule
    between fields.
    """
    derived = with_fields(
        config,
        model={"dropout": 0.0, "attention_dropout": 0.0},
        feed_forward=_soon_by_threshold(config.feed_forward),
        attention=_soon_by_threshold(config.attention),
        parallel=ParallelConfig(zero_stage=0).model_dump(),
        data={"validation": None, "test": None},
        training={
            "steps": steps,
            "precision": precision,
            "warmup_steps": min(config.training.warmup_steps, steps),
            "validate_every": 0,
            "expert_products": _fixed_products(config.training, precision),
        },
        checkpoint={"every": 1, "keep": steps},
        logging={"every": 1, "tensorboard": False},
        routes=RoutesConfig().model_dump(),
    )
    if faults := [fault for rule in RULES for fault in rule(derived)]:
        raise UserError(report("the config, as it would run here,", faults))
    return derived


def shrunken(config: RunConfig, *, ranks: int, stages: int) -> RunConfig:
    """`config` with few layers, short sequences and a small batch, all widths as they are.

    What the sizes of layouts of up to `ranks` ranks divide, they still divide. At least `stages`
    layers stay, and of every kind (routed or dense, in either block) at least one.
    """
    length, batch = config.model.sequence_length, config.training.global_batch_size
    # Whole documents have to fit.
    segments = [config.feed_forward.segment_length, config.attention.segment_length]
    short = max(SHORT_SEQUENCE, *(2 * (segment or 0) for segment in segments))
    short = length if config.model.task == "classification" else short
    batch = _reduced(batch, SMALL_BATCH, ranks)
    micro = min(config.training.micro_batch_size, SMALL_MICRO_BATCH)
    return with_fields(
        _with_few_layers(config, max(stages, FEW_LAYERS)),
        model={"sequence_length": _reduced(length, short, ranks)},
        training={
            "global_batch_size": batch,
            "micro_batch_size": largest_divisor(batch, at_most=micro),
        },
    )


def with_routes(config: RunConfig, use: str, folder: Path) -> RunConfig:
    """`config` with the routes of its steps recorded in `folder`, compared with those there, or
    taken from there, where anything is routed."""
    return with_fields(config, routes={use: str(folder)}) if config.routed_blocks else config


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Such as "model.num_layers 32 -> 4" for every field that differs."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        f"{name} {show(old.get(name))} -> {show(value)}"
        for name, value in new.items()
        if value != old.get(name)
    ]


def _fixed_products(training: TrainingConfig, precision: Precision) -> ExpertProducts:
    """The same for all layouts: each would time them by itself."""
    wanted = training.expert_products
    return "loop" if wanted == "auto" or precision == "fp64" else wanted


def _soon_by_threshold(routing: RoutingConfig) -> dict[str, int]:
    """So short a run would see nothing but the warm-up of thresholds."""
    if routing.selection != "threshold":
        return {}
    return {"threshold_warmup": min(routing.threshold_warmup, 1)}


def largest_divisor(number: int, *, at_most: int) -> int:
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)


def with_fields(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """`config` with fields of its sections replaced, not checked again."""
    updated = {name: _updated(getattr(config, name), new) for name, new in sections.items()}
    return config.model_copy(update=updated)


def _updated(section: S, fields: dict[str, Any]) -> S:
    return section.model_copy(update=fields)


def _reduced(size: int, target: int, ranks: int) -> int:
    """At most `size` and near `target`, a multiple of every divisor of `size` up to `ranks`."""
    step = math.lcm(*(n for n in range(1, ranks + 1) if size % n == 0))
    return min(size, step * math.ceil(target / step))


def _with_few_layers(config: RunConfig, count: int) -> RunConfig:
    layers = range(config.model.num_layers)
    kinds = [(config.attention.routes(n), config.feed_forward.routes(n)) for n in layers]
    firsts = {kinds.index(kind) for kind in kinds}
    others = [layer for layer in layers if layer not in firsts]
    kept = sorted([*firsts, *others[: max(count - len(firsts), 0)]])
    return with_fields(
        config,
        model={"num_layers": len(kept)},
        feed_forward={"routed_layers": _renumbered(config.feed_forward.routed_layers, kept)},
        attention={"routed_layers": _renumbered(config.attention.routed_layers, kept)},
    )


def _renumbered(routed: RoutedLayers, kept: list[int]) -> RoutedLayers:
    if isinstance(routed, str):
        return routed
    return [number for number, layer in enumerate(kept) if layer in routed]


def _leaves(config: RunConfig) -> Iterator[tuple[str, object]]:
    for name, value in config:
        if isinstance(value, Section):
            yield from ((f"{name}.{field}", inner) for field, inner in value)
        else:
            yield name, value
