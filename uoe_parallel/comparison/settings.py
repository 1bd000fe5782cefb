"""What a comparison is: every field of its YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from uoe_parallel.config.faults import report
from uoe_parallel.config.load import put_overrides, read_tree
from uoe_parallel.config.schema import Section
from uoe_parallel.errors import UserError

Budget = Literal["flops", "tokens", "time"]


class Contender(Section):
    """A model that takes part, by what distinguishes it from `run`."""

    about: str = ""
    """What it is, for the table."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Sections and fields of `run` that it has otherwise."""
    same_flops_as: str | None = None
    """Another contender: this one's model.ffn_size becomes that at which a token costs as much."""


class ComparisonConfig(Section):
    """Contenders, and the terms that are the same for all of them."""

    folder: str
    """Where runs and results go, beside those of other budgets."""
    budget: Budget = "flops"
    """What all runs get as much of as the first baseline takes for the training.steps of `run`:
    floating-point operations, tokens, or seconds of training steps. Steps of warm-up and between
    validations are the same shares of every run."""
    seeds: PositiveInt = 3
    """Runs of each contender that are compared: with `run.seed` + 1, + 2 and so on. A seed gives
    all contenders the same order of the data, and the same first weights where they have the
    same ones."""
    learning_rates: list[float] = Field(min_length=1)
    """Peak learning rates that each contender is tried with, with `run.seed`. The one of the
    lowest validation loss is the contender's; min_learning_rate keeps its ratio to it. A single one
    is not tried first."""
    sweep_share: float = Field(default=0.3, gt=0, le=1)
    """Of the budget, for each of these tries."""
    baselines: list[str] = Field(min_length=1)
    """The contenders that every other one is compared with. The first one sets the budget."""
    launch: list[str] = Field(default=["python", "-m", "uoe_parallel.pretrain"], min_length=1)
    """The command that takes --config; "python" is the one that runs the comparison."""
    run: dict[str, Any]
    """A run's config, without run_dir."""
    contenders: dict[str, Contender]

    @model_validator(mode="after")
    def _names_are_known(self) -> ComparisonConfig:
        for name in self.baselines:
            if name not in self.contenders:
                raise ValueError(f"baselines: {name} is none of the contenders")
        for name, contender in self.contenders.items():
            other = contender.same_flops_as
            if other is None:
                continue
            if other not in self.contenders or self.contenders[other].same_flops_as is not None:
                raise ValueError(
                    f"contenders.{name}.same_flops_as: {other} is no contender of its own size"
                )
        return self

    def only(self, names: Sequence[str]) -> ComparisonConfig:
        """With these contenders alone, and those that they can't do without: the first baseline and
        the ones that they are made to cost as much as. Raises UserError for an unknown name."""
        kept = {self.baselines[0], *names}
        if unknown := kept - self.contenders.keys():
            known = ", ".join(self.contenders)
            raise UserError(f"--only {min(unknown)}: no such contender; name some of {known}")
        kept |= {other for name in kept if (other := self.contenders[name].same_flops_as)}
        return self.model_copy(
            update={
                "contenders": {n: c for n, c in self.contenders.items() if n in kept},
                "baselines": [name for name in self.baselines if name in kept],
            }
        )


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """The comparison in a YAML file, with `field=value` overrides, as of `load_config`, on top.

    Raises UserError for a file or overrides that can't be read, and for what is wrong with the
    comparison itself. Configs of runs are checked where they are made (`contenders.py`).
    """
    tree = read_tree(path, "folder, learning_rates, baselines, run and contenders")
    source = f"the comparison {path}"
    if faults := list(put_overrides(tree, overrides)):
        raise UserError(report(source, faults))
    try:
        return ComparisonConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        told = f"{field}: {problem}" if field else problem
        raise UserError(f"{source}: {told}; correct it there") from None
