"""Routes that are kept and used again, whatever the order in which a block's passes come."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from uoe_parallel.routing.tape import Player, Recorder, RouteTape, pack, packed_size, unpack

S, B, E = 5, 2, 11

# Which micro-batch each pass is about; with gradients, or without.
PLAIN = [("grad", 0), ("grad", 1), ("grad", 2)]
RECOMPUTED = [(k, n) for n in range(3) for k in ("no grad", "grad")]
PIPELINED = [
    *[("no grad", 0), ("no grad", 1), ("grad", 0)],
    *[("no grad", 2), ("grad", 1), ("grad", 2)],
]
AFTER_ALL = [*[("no grad", n) for n in range(3)], *[("grad", n) for n in range(3)]]
every_order = pytest.mark.parametrize(
    "order",
    [PLAIN, RECOMPUTED, PIPELINED, AFTER_ALL],
    ids=["plain", "recomputed", "pipelined", "after all"],
)
Order = Iterable[tuple[str, int]]


def masks(seed: int) -> list[Tensor]:
    """Of three micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(S, B, E, generator=generator) < 0.4 for _ in range(3)]


def passes(tape: RouteTape, order: Order, own: list[Tensor]) -> list[tuple[int, Tensor]]:
    """What a tape returns for each pass of a block that chooses `own`."""
    returned = []
    for kind, number in order:
        with torch.set_grad_enabled(kind == "grad"):
            returned.append((number, tape(own[number])))
    return returned


def recorded(own: list[Tensor]) -> Tensor:
    tape = Recorder(len(own))
    passes(tape, PLAIN, own)
    return tape.finish()


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packed_masks_come_back(num_experts: int, seed: int) -> None:
    mask = torch.rand(3, 2, num_experts, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert packed.shape == (3, 2, packed_size(num_experts)) and packed.dtype == torch.uint8
    # The order of bits is a format on disk.
    expected = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    assert packed.tolist() == expected.tolist()
    assert torch.equal(unpack(packed, num_experts), mask)


@every_order
def test_recorder_keeps_each_micro_batch_once_and_changes_none(order: Order) -> None:
    own, tape = masks(1), Recorder(3)
    for number, mask in passes(tape, order, own):
        assert mask is own[number]
    routes = tape.finish()
    assert routes.shape == (3 * B, S, packed_size(E))
    assert torch.equal(unpack(routes, E), torch.cat(own, dim=1).transpose(0, 1))


@every_order
def test_player_follows_and_counts_each_token_once(order: Order) -> None:
    kept, own = masks(1), masks(1)
    own[0][3, 1] ^= True  # every bit of one token
    own[2][0, 0, 10] ^= True  # one bit
    own[2][4, :, 2] ^= True  # two tokens
    tape = Player(recorded(kept), B, follow=True)
    for number, mask in passes(tape, order, own):
        assert mask.dtype == torch.bool and mask.is_contiguous()
        assert torch.equal(mask, kept[number])
    assert int(tape.finish()) == 4


@every_order
def test_comparison_leaves_routes_alone_and_counts_the_same(order: Order) -> None:
    own = masks(2)
    tape = Player(recorded(masks(1)), B, follow=False)
    for number, mask in passes(tape, order, own):
        assert mask is own[number]
    differs = [(a != b).any(-1).sum() for a, b in zip(own, masks(1), strict=True)]
    assert int(tape.finish()) == sum(differs) > 0


def test_recomputation_that_routes_otherwise_is_noticed() -> None:
    tape, own = Recorder(1), masks(1)[0]
    with torch.no_grad():
        tape(own)
    with pytest.raises(AssertionError, match="micro-batch 0"):
        tape(~own)


@pytest.mark.parametrize(
    "order", [PLAIN[:2], RECOMPUTED[:-1], [*PLAIN, ("no grad", 0)]], ids=["plain", "grad", "extra"]
)
def test_step_with_too_few_passes_is_noticed(order: Order) -> None:
    for tape in (Recorder(3), Player(recorded(masks(1)), B, follow=True)):
        passes(tape, order, masks(1))
        with pytest.raises(AssertionError, match="passes"):
            tape.finish()


def test_pass_of_a_micro_batch_too_many_is_noticed() -> None:
    """Such as a second pass with gradients, by recomputation that keeps the graph."""
    for tape in (Recorder(3), Player(recorded(masks(1)), B, follow=True)):
        passes(tape, PLAIN, masks(1))
        with pytest.raises(AssertionError, match="more passes than the step's 3"):
            tape(masks(1)[0])


@pytest.mark.parametrize(
    "shape", [(S + 1, B, E), (S - 1, B, E), (S, B + 1, E), (S, 1, E), (1, 1, E), (S, B, E + 8)]
)
def test_routes_of_another_shape_are_noticed(shape: tuple[int, int, int]) -> None:
    for follow in (True, False):
        tape = Player(recorded(masks(1)), B, follow=follow)
        with pytest.raises(AssertionError, match="micro-batch 0 has routes of shape"):
            tape(torch.zeros(shape, dtype=torch.bool))
