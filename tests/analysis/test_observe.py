"""Every collective is counted once, with what the rank puts in."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings

from tests.analysis.cases import Seen
from tests.harness import Ranks
from uoe_parallel.analysis.observe import CollectiveObserver, Interception, Observed
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose

ONES = torch.ones(6)
BYTES = 24


def _group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _reduce_in_backward() -> None:
    x = comm.sum_gradient(ONES.clone().requires_grad_(), _group(), Purpose.OTHER)
    x.sum().backward()


def _send_around() -> None:
    """To the other rank only, from rank 1 to 0."""
    if dist.get_rank() == 1:
        dist.send(ONES, dst=0)
    else:
        dist.recv(ONES.clone(), src=1)


def _uneven() -> None:
    """Rank r keeps r + 1 rows of six and sends the rest."""
    own = dist.get_rank() + 1
    send = [own, 6 - own] if dist.get_rank() == 0 else [6 - own, own]
    receive = [1, 4] if dist.get_rank() == 0 else [5, 2]
    comm.all_to_all(ONES, receive, send, _group(), Purpose.OTHER)


def _by_deepspeed() -> None:
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    deepspeed.comm.all_reduce(ONES.clone())


ACTS: dict[str, Callable[[], object]] = {
    "all_reduce": lambda: dist.all_reduce(ONES.clone()),
    "all_reduce in backward": _reduce_in_backward,
    "all_reduce by deepspeed": _by_deepspeed,
    "all_reduce of several": lambda: dist.all_reduce_coalesced(
        [ONES[:4].clone(), ONES[4:].clone()]
    ),
    "all_gather": lambda: dist.all_gather([torch.empty(6) for _ in range(2)], ONES),
    "all_gather by megatron": lambda: mappings.gather_from_sequence_parallel_region(
        ONES, group=_group()
    ),
    "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(3), ONES),
    "all_to_all": _uneven,
    "broadcast": lambda: dist.broadcast(ONES.clone(), src=1),
    "send": _send_around,
    "barrier": dist.barrier,
    "nothing": lambda: dist.new_group([dist.get_rank()], use_local_synchronization=True),
}
EXPECTED: dict[str, list[Observed | None]] = {
    **{act: [Observed(1, BYTES, 0)] * 2 for act in ACTS},
    "all_to_all": [Observed(1, BYTES, 4), Observed(1, BYTES, 8)],
    "broadcast": [Observed(1, 0, 0), Observed(1, BYTES, 0)],
    "send": [None, Observed(1, BYTES, 0)],
    "barrier": [Observed(1, 0, 0)] * 2,
    "nothing": [None, None],
}


def _watch(act: str) -> Seen:
    ACTS[act]()  # what is only done the first time
    with CollectiveObserver() as observer:
        ACTS[act]()
    ACTS[act]()  # and not after it has left
    return observer.seen


@pytest.mark.parametrize("act", ACTS)
def test_collective_is_counted(ranks: Ranks, act: str) -> None:
    expected = [{} if seen is None else {(act.split()[0], (0, 1)): seen} for seen in EXPECTED[act]]
    assert ranks(2).run(_watch, act) == expected


def _reduce_alone() -> Seen:
    with CollectiveObserver() as observer:
        dist.all_reduce(ONES.clone())
    return observer.seen


def test_group_of_one_is_left_out(ranks: Ranks) -> None:
    assert ranks(1).run(_reduce_alone) == [{}]


def _unknown_operator() -> None:
    with CollectiveObserver(), pytest.raises(KeyError, match="monitored_barrier"):
        dist.monitored_barrier()
    with Interception():  # who only looks on ends no run
        dist.monitored_barrier()


def test_operator_that_it_does_not_know_is_no_silence(ranks: Ranks) -> None:
    ranks(1).run(_unknown_operator)
