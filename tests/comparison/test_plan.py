"""Which runs there are, and how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comparison.cases import comparison
from uoe_parallel.comparison.contenders import models
from uoe_parallel.comparison.plan import Plan, timings


def test_a_budget_of_flops_gives_all_as_many(tmp_path: Path) -> None:
    given = comparison(tmp_path)
    contenders = models(given)
    plan = Plan(given, contenders)
    spent = {name: plan.steps(name) * model.flops_per_token for name, model in contenders.items()}
    assert plan.steps("dense") == 40 < plan.steps("routed")
    assert all(flops == pytest.approx(spent["dense"], rel=0.5 / 40) for flops in spent.values())


def test_a_budget_of_tokens_gives_all_as_many_steps(tmp_path: Path) -> None:
    given = comparison(tmp_path, budget="tokens")
    contenders = models(given)
    plan = Plan(given, contenders)
    assert {plan.steps(name) for name in contenders} == {40}


def test_a_budget_of_time_goes_by_what_a_step_takes(tmp_path: Path) -> None:
    given = comparison(tmp_path, budget="time")
    plan = Plan(given, models(given), {"dense": 0.3, "cheap": 0.1, "routed": 0.6})
    assert [plan.steps(name) for name in ("dense", "cheap", "routed")] == [40, 120, 20]


def test_every_contender_is_tried_with_every_learning_rate(tmp_path: Path) -> None:
    given = comparison(tmp_path, budget="tokens", sweep_share=0.5)
    tries = Plan(given, models(given)).sweep()
    rates = [(t.contender, t.config.training.learning_rate) for t in tries]
    assert rates == [(n, rate) for n in ("dense", "cheap", "routed") for rate in (0.01, 0.02)]
    for training in (t.config.training for t in tries):
        assert (training.steps, training.warmup_steps, training.validate_every) == (20, 5, 0)
        # The ratio that run has, 1e-3 to 0.01.
        assert training.min_learning_rate == pytest.approx(training.learning_rate / 10)
    assert {t.config.seed for t in tries} == {1}


def test_a_single_learning_rate_is_not_tried_first(tmp_path: Path) -> None:
    given = comparison(tmp_path, learning_rates=[0.01])
    assert Plan(given, models(given)).sweep() == []


def test_seeds_are_compared_one_after_the_other_on_the_same_terms(tmp_path: Path) -> None:
    given = comparison(tmp_path, budget="time")
    plan = Plan(given, models(given), {"dense": 0.2, "cheap": 0.1, "routed": 0.2})
    runs = plan.compared({"dense": 0.02, "cheap": 0.01})
    assert [(t.contender, t.config.seed) for t in runs] == [
        ("dense", 2),
        ("cheap", 2),
        ("dense", 3),
        ("cheap", 3),
    ]
    training = runs[1].config.training
    assert (training.steps, training.warmup_steps, training.validate_every) == (80, 20, 16)
    assert len({t.folder for t in [*plan.sweep(), *runs, *timings(given, models(given))]}) == 13


def test_the_routers_rate_keeps_its_ratio(tmp_path: Path) -> None:
    given = comparison(tmp_path)
    given.run["training"]["router_learning_rate"] = 0.03
    [first, second] = Plan(given, models(given)).sweep()[-2:]
    assert first.config.training.router_learning_rate == pytest.approx(0.03)
    assert second.config.training.router_learning_rate == pytest.approx(0.06)
