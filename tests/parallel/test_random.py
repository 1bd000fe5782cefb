"""Streams agree where ranks hold the same, differ elsewhere, and are wound back to recompute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness import Ranks
from tests.unions import start
from uoe_parallel.parallel.groups import start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.random import (
    Stream,
    draw_from,
    random_setters,
    random_states,
    recompute,
    recompute_between,
    seed_streams,
    stream_seed,
)

SEED = 5
HALF = 0.5  # any probability above 0


def _draw(stream: Stream, size: int = 4) -> Tensor:
    with draw_from(stream, HALF):
        return torch.rand(size)


def test_every_place_of_a_large_run_has_seeds_of_its_own() -> None:
    grid = list(product(range(4), range(64), range(8)))
    own = {
        stream_seed(seed, Stream.RANK, stage=s, data_rank=d, tensor_rank=t)
        for seed in (SEED, SEED + 1)
        for s, d, t in grid
    }
    shared = {
        stream_seed(seed, Stream.TENSOR_GROUP, stage=s, data_rank=d, tensor_rank=t)
        for seed in (SEED, SEED + 1)
        for s, d, t in grid
    }
    assert len(own) == 2 * len(grid)
    assert len(shared) == 2 * len(grid) / 8, "tensor ranks have one stream together"
    assert not own & shared


def _drawn(tensor: int, pipeline: int) -> dict[Stream, list[Tensor]]:
    layout = ParallelLayout(dist.get_world_size(), tensor, pipeline, tensor, False, zero_stage=0)
    seed_streams(SEED, start_groups(layout))
    before = torch.get_rng_state()
    drawn = {stream: [_draw(stream), _draw(stream)] for stream in Stream}
    assert torch.equal(torch.get_rng_state(), before), "the default generator must not move"
    with draw_from(Stream.RANK, 0.0):  # nothing is drawn from a stream that no one needs
        torch.rand(4)
    assert not torch.equal(torch.get_rng_state(), before)
    return drawn


def test_streams_agree_within_a_tensor_group_or_nowhere(ranks: Ranks) -> None:
    everywhere = ranks(8).run(_drawn, tensor=2, pipeline=2)  # and two data ranks
    for drawn in everywhere:
        for once, again in drawn.values():
            assert not torch.equal(once, again), "a stream must move on"
    for i, j in product(range(8), range(8)):
        group = [torch.cat(everywhere[rank][Stream.TENSOR_GROUP]) for rank in (i, j)]
        own = [torch.cat(everywhere[rank][Stream.RANK]) for rank in (i, j)]
        assert torch.equal(*group) == (i // 2 == j // 2)
        assert torch.equal(*own) == (i == j)
        assert not torch.equal(group[0], own[1])


def test_the_same_streams_under_the_same_seed(ranks: Ranks) -> None:
    one, other = (ranks(1).run(_drawn, tensor=1, pipeline=1)[0] for _ in range(2))
    for stream in Stream:
        assert torch.equal(torch.cat(one[stream]), torch.cat(other[stream]))


def _noisy(calls: list[None], x: Tensor, other: Tensor) -> Tensor:
    """A function that draws from everywhere."""
    calls.append(None)
    for noise in (*(_draw(stream, x.numel()) for stream in Stream), torch.rand(x.numel())):
        x = (x * noise).sin() * other
    return x


def _plainly(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return function(*inputs)


def _two_micro_batches(recomputed: bool) -> tuple[list[Tensor], int, int]:
    """Outputs, gradients and states after; how often the function ran; tensors kept by autograd.

    Both forward passes come before the first backward pass, as in a pipeline.
    """
    groups = start(1, sequence_parallel=False)
    seed_streams(SEED, groups)
    calls: list[None] = []
    kept: list[Tensor] = []
    run = recompute if recomputed else _plainly

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    inputs = [torch.linspace(1, 2, 6).requires_grad_(), torch.linspace(3, 4, 6).requires_grad_()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        outputs = [run(partial(_noisy, calls), x, x.detach()) for x in inputs]
    for y in outputs:
        y.square().sum().backward()
    gradients = [x.grad for x in inputs if x.grad is not None]
    states = random_states(groups)
    assert len(gradients) == 2 and len(states) == 3
    return [*(y.detach() for y in outputs), *gradients, *states.values()], len(calls), len(kept)


def test_recomputation_draws_the_same_numbers_again(ranks: Ranks) -> None:
    expected, calls, kept = ranks(1).run(_two_micro_batches, False)[0]
    found, calls_again, kept_again = ranks(1).run(_two_micro_batches, True)[0]
    assert (calls, calls_again) == (2, 4)
    assert kept > 0 and kept_again == 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_an_input_that_requires_no_gradient_costs_a_weight_none() -> None:
    weight = torch.ones(3, requires_grad=True)
    recompute(weight.mul, torch.full((3,), 2.0)).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0] * 3


def _between(again: bool) -> tuple[list[Tensor], int, int, int]:
    """A linear after an activation: result and gradients; bytes of the linear's input after the
    forward pass; hooks that are left after the backward pass; calls of the activation."""
    start(1, sequence_parallel=False)
    x, weight = (torch.linspace(-1, 2, n).view(-1, 4).requires_grad_() for n in (12, 8))
    calls: list[None] = []
    inputs: list[Tensor] = []

    def activate(x: Tensor) -> Tensor:
        calls.append(None)
        return torch.nn.functional.silu(x) * x

    def linear(activated: Tensor) -> Tensor:
        inputs.append(activated)
        return torch.nn.functional.linear(activated, weight)

    y = recompute_between(activate, linear, x) if again else linear(activate(x))
    held = inputs[0].untyped_storage().nbytes()
    y.square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    hooks = len(y._backward_hooks or ())
    return [y.detach(), x.grad, weight.grad], held, hooks, len(calls)


def test_what_lies_between_is_given_back_and_filled_again(ranks: Ranks) -> None:
    expected, *others = ranks(1).run(_between, False)[0]
    found, *others_again = ranks(1).run(_between, True)[0]
    assert others == [4 * 12, 0, 1]
    assert others_again == [0, 0, 3]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def _save(tensor: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What a rank saves after some draws, and what it draws next."""
    groups = start(tensor, sequence_parallel=False)
    seed_streams(SEED, groups)
    for stream in Stream:
        _draw(stream)
    torch.rand(groups.rank + 1)
    states = random_states(groups)
    return states, [*(_draw(stream) for stream in Stream), torch.rand(4)]


def _resume(saved: dict[str, Tensor], tensor: int) -> list[Tensor]:
    """What a rank of a new process draws after it has taken back what concerns it."""
    groups = start(tensor, sequence_parallel=False)
    seed_streams(SEED, groups)
    for key, setter in random_setters(groups).items():
        if key in saved:
            setter(saved[key])
    return [*(_draw(stream) for stream in Stream), torch.rand(4)]


def _merged(ranks: Ranks, world: int, tensor: int) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    states, drawn = zip(*ranks(world).run(_save, tensor), strict=True)
    merged = {key: state for part in states for key, state in part.items()}
    assert len(merged) == sum(map(len, states)), "no two ranks may save under one key"
    return merged, list(drawn)


def test_saved_streams_go_on_where_they_were(ranks: Ranks) -> None:
    saved, expected = _merged(ranks, 4, 2)
    for found, wanted in zip(ranks(4).run(_resume, saved, 2), expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("world", "tensor"), [(4, 1), (4, 4), (2, 2), (1, 1)])
@pytest.mark.parametrize("saved_tensor", [1, 2])
def test_streams_agree_and_differ_as_before_in_another_layout(
    ranks: Ranks, saved_tensor: int, world: int, tensor: int
) -> None:
    saved, _ = _merged(ranks, 2, saved_tensor)
    drawn = ranks(world).run(_resume, saved, tensor)
    for i, j in product(range(world), range(world)):
        (group, own, _), (other_group, other_own, _) = drawn[i], drawn[j]
        assert torch.equal(group, other_group) == (i // tensor == j // tensor)
        assert torch.equal(own, other_own) == (i == j)
