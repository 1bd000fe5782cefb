from __future__ import annotations

from math import pi
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uoe_parallel.training.schedule import learning_rate_factor


class Run(NamedTuple):
    warmup_steps: int
    steps: int
    min_factor: float

    def factors(self, start: int, stop: int) -> list[float]:
        return [learning_rate_factor(step, **self._asdict()) for step in range(start, stop)]


RUNS = st.integers(1, 300).flatmap(
    lambda steps: st.builds(Run, st.integers(0, steps - 1), st.just(steps), st.floats(0.0, 1.0))
)


@given(RUNS)
def test_warm_up_rises_in_equal_strides_from_above_zero_to_the_peak(run: Run) -> None:
    factors = run.factors(0, run.warmup_steps + 1)
    strides = [b - a for a, b in zip([0.0, *factors], factors, strict=False)]
    assert strides == pytest.approx([1 / (run.warmup_steps + 1)] * (run.warmup_steps + 1))
    assert factors[-1] == 1.0


@given(RUNS)
def test_decay_falls_smoothly_from_the_peak_to_the_floor(run: Run) -> None:
    factors = run.factors(run.warmup_steps, run.steps)
    assert all(run.min_factor <= factor <= 1.0 for factor in factors)
    assert factors[-1] > 0.0, "the last step trains"
    falls = [a - b for a, b in zip(factors, [*factors[1:], run.min_factor], strict=True)]
    assert min(falls) >= -1e-12
    # No jumps: a cosine's steepest slope is pi/2 times its mean slope.
    assert max(falls) <= pi / 2 * (1.0 - run.min_factor) / len(factors) + 1e-12
    assert run.factors(run.steps, run.steps + 3) == [run.min_factor] * 3


def test_edges() -> None:
    run = Run(warmup_steps=4, steps=12, min_factor=0.1)
    assert run.factors(0, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert run.factors(8, 9) == pytest.approx([0.55]), "half way down the cosine"
    one_step = Run(warmup_steps=0, steps=1, min_factor=0.0)
    assert one_step.factors(0, 1) == [1.0], "a run of one step trains"
    too_short = Run(warmup_steps=99, steps=12, min_factor=0.1)
    assert too_short.factors(11, 12) == pytest.approx([0.12]), "the run ends while warming up"
    constant = Run(warmup_steps=1, steps=4, min_factor=1.0)
    assert constant.factors(0, 5) == [0.5, 1.0, 1.0, 1.0, 1.0], "a constant rate warms up too"
