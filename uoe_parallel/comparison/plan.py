"""Which trainings a comparison consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uoe_parallel.comparison.contenders import Model, merge
from uoe_parallel.comparison.settings import Budget, ComparisonConfig
from uoe_parallel.config.load import resolve_config
from uoe_parallel.config.schema import RunConfig

Purpose = Literal["timing", "sweep", "compared"]

TIMING_STEPS = 40
TIMING_REPORT = 5
"""Steps between reports: the first one has what only starting takes and is left out."""


@dataclass(frozen=True)
class Training:
    """One run of a contender."""

    contender: str
    purpose: Purpose
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def __str__(self) -> str:
        training = self.config.training
        terms = f"seed {self.config.seed}, learning rate {training.learning_rate:g}"
        return f"{self.contender}: {self.purpose}, {training.steps} steps, {terms}"


class Plan:
    """The trainings of a comparison under its budget."""

    def __init__(
        self,
        comparison: ComparisonConfig,
        models: Mapping[str, Model],
        seconds_per_step: Mapping[str, float] | None = None,
    ) -> None:
        """seconds_per_step: of every contender, which a budget of time needs."""
        self._comparison = comparison
        self._models = models
        first = models[comparison.baselines[0]]
        self._base = first.config.training
        costs = _costs(comparison.budget, models, seconds_per_step or {})
        self._shares = {name: costs[first.name] / cost for name, cost in costs.items()}

    def steps(self, name: str) -> int:
        """Of each compared run of a contender."""
        return _scaled(self._base.steps, self._shares[name])

    def sweep(self) -> list[Training]:
        """Every contender with every learning rate, one contender after the other; nothing where
        there is no choice."""
        comparison = self._comparison
        if len(comparison.learning_rates) == 1:
            return []
        return [
            self._training(name, "sweep", rate, model.config.seed, comparison.sweep_share)
            for name, model in self._models.items()
            for rate in comparison.learning_rates
        ]

    def compared(self, learning_rates: Mapping[str, float]) -> list[Training]:
        """The runs of contenders with these rates: of all with the first seed, then with the next
        one. What slows the machine down for a while does so to all of them alike."""
        return [
            self._training(name, "compared", learning_rates[name], model.config.seed + number)
            for number in range(1, self._comparison.seeds + 1)
            for name, model in self._models.items()
            if name in learning_rates
        ]

    def _training(
        self, name: str, purpose: Purpose, rate: float, seed: int, of_budget: float = 1.0
    ) -> Training:
        model, base = self._models[name], self._base
        steps = _scaled(self.steps(name), of_budget)
        share = steps / base.steps
        own = model.config.training
        changes = {
            "steps": steps,
            "warmup_steps": round(own.warmup_steps * share),
            "validate_every": 0 if purpose == "sweep" else _scaled(own.validate_every, share),
            "learning_rate": rate,
            "min_learning_rate": own.min_learning_rate * rate / own.learning_rate,
        }
        if own.router_learning_rate is not None:
            changes["router_learning_rate"] = own.router_learning_rate * rate / own.learning_rate
        place = f"{rate:g}" if purpose == "sweep" else f"{seed}"
        return Training(name, purpose, self._config(model, purpose, place, seed, changes))

    def _config(
        self, model: Model, purpose: Purpose, place: str, seed: int, training: Mapping[str, object]
    ) -> RunConfig:
        comparison = self._comparison
        return changed(
            model.config,
            run_dir=f"{comparison.folder}/{comparison.budget}/{model.name}/{purpose}-{place}",
            seed=seed,
            training=training,
            checkpoint={"keep": 1},
            logging={"tensorboard": False},
        )


def timings(comparison: ComparisonConfig, models: Mapping[str, Model]) -> list[Training]:
    """A short run of every contender, to find what a step of it takes."""
    training = {"steps": TIMING_STEPS, "validate_every": 0, "validation_sequences": 1}
    logging = {"every": TIMING_REPORT, "tensorboard": False}
    return [
        Training(
            name,
            "timing",
            changed(
                model.config,
                run_dir=f"{comparison.folder}/timing/{name}",
                training=training,
                logging=logging,
            ),
        )
        for name, model in models.items()
    ]


def changed(config: RunConfig, **changes: object) -> RunConfig:
    """With fields of it replaced, and of sections those that are given."""
    tree = config.model_dump()
    merge(tree, changes)
    return resolve_config(tree, source=f"the run {tree['run_dir']}")


def _costs(
    budget: Budget, models: Mapping[str, Model], seconds_per_step: Mapping[str, float]
) -> dict[str, float]:
    """Of a step, in whatever unit the budget has."""
    if budget == "time":
        return {name: seconds_per_step[name] for name in models}
    if budget == "tokens":
        return dict.fromkeys(models, 1.0)
    return {name: model.flops_per_token for name, model in models.items()}


def _scaled(number: int, share: float) -> int:
    """A share of a number of steps; 0 stays 0, and nothing else becomes it."""
    return max(round(number * share), min(number, 1))
