"""All of a comparison, from its first training to its results."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from uoe_parallel.comparison.collect import (
    Outcome,
    best_learning_rate,
    outcome,
    result,
    seconds_per_step,
)
from uoe_parallel.comparison.contenders import Model, models
from uoe_parallel.comparison.outlook import outlook
from uoe_parallel.comparison.plan import Plan, Training, timings
from uoe_parallel.comparison.results import Comparison
from uoe_parallel.comparison.runs import Runner
from uoe_parallel.comparison.settings import ComparisonConfig
from uoe_parallel.errors import UserError

Done = list[tuple[Training, Outcome]]


class Session:
    """A comparison whose trainings are started, or only looked at as far as they are done."""

    def __init__(self, comparison: ComparisonConfig, runner: Runner | None) -> None:
        """runner: None starts nothing. Raises UserError for what is wrong with the comparison."""
        self._comparison = comparison
        self._runner = runner
        self._models = models(comparison)
        for model in self._models.values():
            _check(model)

    def outlook(self) -> Table:
        """What it takes. Raises UserError for a budget of time before steps have been timed."""
        plan = Plan(self._comparison, self._models, self._seconds())
        return outlook(self._comparison, self._models, plan)

    def results(self, jobs: int) -> Comparison:
        """Of contenders that have all their runs. Raises UserError for a run that fails.

        jobs: how many runs were trained at once.
        """
        comparison = self._comparison
        plan = Plan(comparison, self._models, self._seconds())
        tries = plan.sweep()
        swept = self._done(tries)
        if tries:
            best = {
                name: best_learning_rate({t.config.training.learning_rate: o.loss for t, o in own})
                for name in self._models
                if len(own := _of(name, swept)) == len(comparison.learning_rates)
            }
        else:
            best = dict.fromkeys(self._models, comparison.learning_rates[0])
        compared = self._done(plan.compared(best))
        return Comparison(
            config=comparison,
            task=next(iter(self._models.values())).config.model.task,
            jobs=jobs,
            results=[
                result(self._models[name], _of(name, swept), runs)
                for name in best
                if len(runs := _of(name, compared)) == comparison.seeds
            ],
        )

    def _seconds(self) -> dict[str, float]:
        """Of a step of each contender, one after the other, where these set the budget."""
        if self._comparison.budget != "time":
            return {}
        trainings = timings(self._comparison, self._models)
        alone = None if self._runner is None else self._runner.one_by_one()
        found = {t.contender: seconds_per_step(o.reports) for t, o in _done(trainings, alone)}
        if missing := self._models.keys() - found.keys():
            raise UserError(
                f"a step of {min(missing)} has not been timed yet, and the budget is one of time; "
                "train first"
            )
        return found

    def _done(self, trainings: Sequence[Training]) -> Done:
        return _done(trainings, self._runner)


def _done(trainings: Sequence[Training], runner: Runner | None) -> Done:
    if runner is not None:
        runner.run(trainings)
    found = [(training, outcome(training)) for training in trainings]
    return [(training, it) for training, it in found if it is not None]


def _of(name: str, done: Done) -> Done:
    return [(training, found) for training, found in done if training.contender == name]


def _check(model: Model) -> None:
    config = model.config
    if config.training.validate_every == 0:
        raise UserError(
            f"contender {model.name}: training.validate_every = 0 makes no curve; set it to the "
            "steps between the points of one"
        )
    if config.data.test is None and config.data.split is None:
        raise UserError(
            f"contender {model.name}: data.test is missing. Learning rates are chosen by the "
            "validation text, and models are compared on another one; name it, or set data.split"
        )
