"""From what distinguishes a contender to the config that its runs have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uoe_parallel.analysis.flops import ParameterCounts, model_flops_per_token, parameter_counts
from uoe_parallel.comparison.settings import ComparisonConfig, Contender
from uoe_parallel.config.load import resolve_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.planning.stage import vocabulary


@dataclass(frozen=True)
class Model:
    """A contender's model, and what a token costs in it."""

    name: str
    about: str
    config: RunConfig
    """With the seed, learning rate and steps of `run`."""
    parameters: ParameterCounts
    flops_per_token: float
    """Forward and backward."""


def models(comparison: ComparisonConfig) -> dict[str, Model]:
    """Every contender's by name, in the order of the comparison.

    Raises UserError for a contender whose config is wrong, or that no width makes as costly as the
    other that it names.
    """
    found: dict[str, Model] = {}
    for name, contender in comparison.contenders.items():
        if contender.same_flops_as is None:
            found[name] = _model(name, contender, _config(comparison, name, contender))
    for name, contender in comparison.contenders.items():
        if contender.same_flops_as is not None:
            costly = found[contender.same_flops_as]
            found[name] = _model(name, contender, _as_costly(comparison, name, contender, costly))
    return {name: found[name] for name in comparison.contenders}


def _config(
    comparison: ComparisonConfig, name: str, contender: Contender, ffn_size: int | None = None
) -> RunConfig:
    tree = copy.deepcopy(comparison.run)
    # Each run gets a folder of its own; here it names the contender in messages.
    merge(tree, {"run_dir": f"{comparison.folder}/{name}"})
    merge(tree, contender.change)
    if ffn_size is not None:
        merge(tree, {"model": {"ffn_size": ffn_size}})
    return resolve_config(tree, source=f"the run of contender {name}")


def merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put `changes` into `tree`, section by section: other fields of a section stay."""
    for name, value in changes.items():
        inner = tree.get(name)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            merge(inner, value)
        else:
            tree[name] = copy.deepcopy(value)


def _model(name: str, contender: Contender, config: RunConfig) -> Model:
    vocab_size = vocabulary(config)[1]
    return Model(
        name=name,
        about=contender.about,
        config=config,
        parameters=parameter_counts(config, vocab_size),
        flops_per_token=model_flops_per_token(config, vocab_size).routed,
    )


def _as_costly(
    comparison: ComparisonConfig, name: str, contender: Contender, other: Model
) -> RunConfig:
    """The contender with the width at which its FLOPs are nearest, as they grow evenly with it."""
    unit = _config(comparison, name, contender).feed_forward.num_experts
    few, more = (
        _model(name, contender, _config(comparison, name, contender, units * unit)).flops_per_token
        for units in (1, 2)
    )
    units = 1 + round((other.flops_per_token - few) / (more - few))
    if units < 1:
        raise UserError(
            f"contenders.{name}.same_flops_as = {other.name}: that one takes "
            f"{other.flops_per_token:.3g} FLOPs a token, less than this one does for attention and "
            f"head, whatever its model.ffn_size; give {name} fewer layers or a smaller "
            "model.hidden_size"
        )
    return _config(comparison, name, contender, units * unit)
