"""Spreads, paired differences, and points on curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uoe_parallel.comparison.results import Point
from uoe_parallel.comparison.statistics import (
    flops_to_reach,
    loss_at,
    mean_curve,
    paired_difference,
    spread,
)

FALLING = [Point(0, 0, 0.0, 6.0), Point(1, 100, 1e3, 4.0), Point(4, 400, 4e3, 3.0)]


def test_spread_of_known_values() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.smallest, found.largest) == (3.0, 1.0, 6.0)
    assert found.deviation == pytest.approx(math.sqrt(7))
    assert spread([2.0]).deviation is None


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_diverged_run_is_counted_and_never_left_out(lost: float) -> None:
    found = spread([1.0, lost, 3.0])
    assert found.not_finite == 1
    assert found.mean is None
    assert found.deviation is None
    difference = paired_difference({1: 1.0, 2: lost}, {1: 2.0, 2: 2.0})
    assert difference.mean is None
    assert difference.interval is None
    assert not difference.is_told_apart


def test_interval_is_that_of_students_t_table() -> None:
    """Differences 1, 2 and 3 by seed: mean 2, deviation 1, and 4.3027 standard errors."""
    found = paired_difference({3: 13.0, 1: 2.0, 2: 7.0}, {1: 1.0, 2: 5.0, 3: 10.0})
    assert found.values == [1.0, 2.0, 3.0]
    half = 4.302653 / math.sqrt(3)
    assert found.interval == pytest.approx((2 - half, 2 + half), rel=1e-6)
    assert not found.is_told_apart
    assert found.p_value == pytest.approx(0.0741799, rel=1e-5)


def test_what_a_seed_does_to_both_cancels() -> None:
    shared = {1: 0.0, 2: 5.0, 3: -7.0}
    own = {1: 0.10, 2: 0.11, 3: 0.09}
    found = paired_difference({s: shared[s] + own[s] for s in shared}, shared)
    assert found.mean == pytest.approx(0.1)
    assert found.is_told_apart


def test_one_seed_has_no_interval() -> None:
    found = paired_difference({1: 1.0}, {1: 3.0})
    assert found.mean == -2.0
    assert found.interval is None
    assert found.p_value is None
    assert not found.is_told_apart


def test_equal_differences_have_an_interval_without_width() -> None:
    assert paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}).p_value == 0.0
    same = paired_difference({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0})
    assert (same.interval, same.p_value, same.is_told_apart) == ((0.0, 0.0), 1.0, False)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draws = np.random.default_rng(5).normal(0.3, 2.0, (1000, 3))
    zero = dict.fromkeys(range(3), 0.0)
    covered = 0
    for row in draws:
        interval = paired_difference(dict(enumerate(row.tolist())), zero).interval
        assert interval is not None
        covered += interval[0] <= 0.3 <= interval[1]
    # Four standard deviations of a count of 1000.
    assert abs(covered / 1000 - 0.95) < 0.028


def test_losses_between_validations_are_linear_in_the_logarithm() -> None:
    assert loss_at(FALLING, "tokens", 200) == pytest.approx(3.5)
    assert loss_at(FALLING, "flops", 4e3) == 3.0
    assert math.isnan(loss_at(FALLING, "tokens", 99))
    assert math.isnan(loss_at(FALLING, "tokens", 401))
    assert math.isnan(loss_at([FALLING[0]], "tokens", 1))


def test_mean_curve_ends_where_a_run_does() -> None:
    other = [Point(p.step, p.tokens, p.flops, p.loss + 1) for p in FALLING]
    assert [p.loss for p in mean_curve([FALLING, other])] == [6.5, 4.5, 3.5]
    assert len(mean_curve([FALLING, other[:2]])) == 2
    other[1] = Point(1, 100, 1e3, math.inf)
    assert len(mean_curve([FALLING, other])) == 1


def test_flops_to_reach_a_loss() -> None:
    assert flops_to_reach(FALLING, 3.5) == pytest.approx(2e3)
    assert flops_to_reach(FALLING, 3.0) == pytest.approx(4e3)
    assert flops_to_reach(FALLING, 5.0) == 1e3
    assert flops_to_reach(FALLING, 2.9) is None
    assert flops_to_reach([], 2.9) is None


def test_the_first_time_counts_even_if_the_loss_rises_again() -> None:
    rising = [*FALLING, Point(8, 800, 8e3, 3.4), Point(16, 1600, 16e3, 2.0)]
    assert flops_to_reach(rising, 3.2) == pytest.approx(1e3 * 4**0.8)
