"""Thresholds find the quantiles of scores, from counts that add up over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.experts.documents import Documents
from uoe_parallel.routing.selection.threshold import Threshold
from uoe_parallel.routing.units import Units

EXPERTS = 4
EVERY = torch.ones(256, 2, dtype=torch.bool)


def rule(top_k: int = 1, **fields: float) -> Threshold:
    return Threshold(RoutingConfig(top_k=top_k, threshold_warmup=2, **fields), EXPERTS)  # pyright: ignore[reportArgumentType]


def draw(step: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """[256, 2, E]: each expert has its own distribution."""
    generator = torch.Generator().manual_seed(step)
    scores = torch.randn(256, 2, EXPERTS, generator=generator)
    return scale * scores * torch.tensor([0.01, 0.3, 1.0, 5.0]) + shift + torch.arange(4) * scale


def take(threshold: Threshold, scores: Tensor) -> Tensor:
    return threshold(scores, Units.of(Documents.whole(256, 2, scores.device), 1))


def learn(threshold: Threshold, steps: int, scale: float = 1.0, shift: float = 0.0) -> None:
    for step in range(steps):
        scores = draw(step, scale, shift)
        threshold.observe(scores, take(threshold, scores), EVERY)
        threshold.move(threshold.observed)
        threshold.reset()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.01, 0.0), (100.0, 0.0), (1.0, -30.0)])
def test_an_expert_takes_its_share_whatever_the_scores(
    top_k: int, scale: float, shift: float
) -> None:
    threshold = rule(top_k)
    learn(threshold, 60, scale, shift)
    load_E = torch.stack([take(threshold, draw(s, scale, shift)) for s in range(100, 120)])
    share_E = load_E.double().mean((0, 1, 2))
    torch.testing.assert_close(share_E, torch.full((4,), top_k / 4).double(), atol=0.02, rtol=0)


def test_thresholds_follow_scores_that_move() -> None:
    threshold = rule(2)
    learn(threshold, 40)
    before = threshold.state["threshold"]
    learn(threshold, 60, shift=1.0)
    torch.testing.assert_close(
        threshold.state["threshold"] - before, torch.ones(4).double(), atol=0.15, rtol=0
    )


def test_the_first_steps_take_all_and_learn() -> None:
    threshold = rule()
    for step in range(2):
        assert take(threshold, draw(step)).all()
        learn(threshold, 1)
    assert threshold.state["steps"].item() == 2
    assert not take(threshold, draw(3)).all()


def test_nothing_moves_between_steps() -> None:
    threshold = rule()
    learn(threshold, 5)
    state = {name: value.clone() for name, value in threshold.state.items()}
    for step in range(3):
        threshold.observe(draw(step), take(threshold, draw(step)), EVERY)
    assert all(torch.equal(state[name], value) for name, value in threshold.state.items())


def test_what_ranks_see_adds_up() -> None:
    scores = draw(0)
    whole, first, second = rule(), rule(), rule()
    whole.observe(scores, EVERY.unsqueeze(-1), EVERY)
    first.observe(scores[:100], EVERY.unsqueeze(-1), EVERY[:100])
    second.observe(scores[100:], EVERY.unsqueeze(-1), EVERY[100:])
    torch.testing.assert_close(first.observed + second.observed, whole.observed, rtol=1e-12, atol=0)


def test_units_and_experts_that_could_not_be_chosen_do_not_count() -> None:
    scores = draw(0)
    masked, counted = scores.clone(), EVERY.clone()
    masked[::2, :, 1] = -torch.inf
    counted[5:9] = False
    found, wanted = rule(), rule()
    found.observe(masked, EVERY.unsqueeze(-1), counted)
    for expert in range(EXPERTS):
        kept = counted.clone()
        if expert == 1:
            kept[::2] = False
        alone = rule()
        alone.observe(scores, EVERY.unsqueeze(-1), kept)
        parts = found._parts(found.observed)[:-1], alone._parts(alone.observed)[:-1]
        for part, other in zip(*parts, strict=True):
            torch.testing.assert_close(part[expert], other[expert], rtol=1e-12, atol=0)
    found.move(found.observed)
    assert found.state["threshold"].isfinite().all()
    # An expert that nobody could choose stays where it is.
    masked[..., 2] = -torch.inf
    wanted.observe(masked, EVERY.unsqueeze(-1), counted)
    wanted.move(wanted.observed)
    assert wanted.state["threshold"][2] == 0


def test_an_expert_that_some_units_may_not_choose_still_gets_its_share_of_all() -> None:
    threshold = rule(top_k=1)
    may_SB1 = (torch.arange(256) % 2 == 0).view(-1, 1, 1)
    for step in range(40):
        scores = draw(step).masked_fill(~may_SB1, -torch.inf)
        threshold.observe(scores, take(threshold, scores), EVERY)
        threshold.move(threshold.observed)
        threshold.reset()
    taken = take(threshold, draw(100).masked_fill(~may_SB1, -torch.inf)).double().mean((0, 1))
    torch.testing.assert_close(taken, torch.full((4,), 0.25).double(), atol=0.03, rtol=0)


def test_a_share_of_all_takes_all_and_stays_where_the_scores_are() -> None:
    threshold = rule(top_k=EXPERTS)
    learn(threshold, 40)
    assert take(threshold, draw(100)).all()
    before = threshold.state["threshold"]
    learn(threshold, 40)
    assert ((threshold.state["threshold"] - before).abs() < 5).all()
