"""Each collective by hand on two ranks, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.harness import Ranks
from tests.unions import start
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose

Operation = Callable[[Tensor, ProcessGroup, Purpose], Tensor]
OTHER = Purpose.OTHER


def _forward_and_backward(
    operation: Operation, inputs: list[Tensor], upstreams: list[Tensor]
) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    groups = start(dist.get_world_size(), sequence_parallel=False)
    x = inputs[rank].clone().requires_grad_()
    y = operation(x, groups.tensor, OTHER)
    y.backward(upstreams[rank])
    assert x.grad is not None
    return y.detach(), x.grad


def _check(
    found: list[tuple[Tensor, Tensor]], values: list[Tensor], gradients: list[Tensor]
) -> None:
    for (value, gradient), wanted, wanted_gradient in zip(found, values, gradients, strict=True):
        assert torch.equal(value, wanted)
        assert torch.equal(gradient, wanted_gradient)


A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
U, V = torch.tensor([[3.0, 5.0]]), torch.tensor([[7.0, 11.0]])


def test_sum_gradient(ranks: Ranks) -> None:
    found = ranks(2).run(_forward_and_backward, comm.sum_gradient, [A, B], [U, V])
    _check(found, [A, B], [U + V, U + V])


def _strided_and_shared(group_size: int) -> tuple[Tensor, Tensor]:
    """Gradients of x behind sum_gradient and of a branch beside it that reads the same gradient."""
    group = start(group_size, sequence_parallel=False).tensor
    x, beside = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    # sum() hands down an expanded gradient, and + hands one tensor to both branches.
    (comm.sum_gradient(x, group, OTHER) + beside).sum().backward()
    y = torch.zeros(2, 3, requires_grad=True)
    z = torch.zeros(2, 3, requires_grad=True)
    (comm.sum_gradient(y, group, OTHER) + z).backward(torch.ones(2, 3))
    assert x.grad is not None and beside.grad is not None
    assert y.grad is not None and z.grad is not None
    return torch.stack((x.grad, y.grad)), torch.stack((beside.grad, z.grad))


def test_sum_gradient_of_strided_and_shared_gradients(ranks: Ranks) -> None:
    for summed, beside in ranks(2).run(_strided_and_shared, 2):
        assert torch.equal(summed, torch.full((2, 2, 3), 2.0))
        assert torch.equal(beside, torch.ones(2, 2, 3))


def test_sum_forward(ranks: Ranks) -> None:
    found = ranks(2).run(_forward_and_backward, comm.sum_forward, [A, B], [U, V])
    _check(found, [A + B, A + B], [U, V])


def test_sum_shards(ranks: Ranks) -> None:
    x = [torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])]
    u = [torch.tensor([[3.0]]), torch.tensor([[5.0]])]
    found = ranks(2).run(_forward_and_backward, comm.sum_shards, x, u)
    _check(found, [torch.tensor([[11.0]]), torch.tensor([[22.0]])], [torch.cat(u)] * 2)


def test_gather_sequence(ranks: Ranks) -> None:
    """Each rank's gradient is of the whole: what the ranks want of a shard adds up."""
    x = [torch.tensor([[1.0]]), torch.tensor([[2.0]])]
    u = [torch.tensor([[3.0], [5.0]]), torch.tensor([[7.0], [11.0]])]
    found = ranks(2).run(_forward_and_backward, comm.gather_sequence, x, u)
    _check(found, [torch.cat(x)] * 2, [torch.tensor([[10.0]]), torch.tensor([[16.0]])])


def _exchange(x: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """Rank 0 sends one row to itself and two to rank 1, which sends one to rank 0 only."""
    send = [[1, 2], [1, 0]]
    receive = [[1, 1], [2, 0]]
    return comm.all_to_all(x, receive[group.rank()], send[group.rank()], group, purpose)


def test_all_to_all_sends_gradients_back(ranks: Ranks) -> None:
    x = [torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[3.0]])]
    u = [torch.tensor([[10.0], [13.0]]), torch.tensor([[11.0], [12.0]])]
    found = ranks(2).run(_forward_and_backward, _exchange, x, u)
    values = [torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [2.0]])]
    _check(found, values, [torch.tensor([[10.0], [11.0], [12.0]]), torch.tensor([[13.0]])])


def _exchange_meanwhile(x: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    """As `_exchange`, with another exchange before the rows are waited for."""
    send = [[1, 2], [1, 0]]
    receive = [[1, 1], [2, 0]]
    arrived = comm.start_all_to_all(x, receive[group.rank()], send[group.rank()], group, purpose)
    again = _exchange(x.detach(), group, purpose)
    rows = arrived()
    assert torch.equal(rows, again)
    return rows


def test_rows_travel_while_others_do(ranks: Ranks) -> None:
    x = [torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[3.0]])]
    u = [torch.tensor([[10.0], [13.0]]), torch.tensor([[11.0], [12.0]])]
    found = ranks(2).run(_forward_and_backward, _exchange_meanwhile, x, u)
    values = [torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [2.0]])]
    _check(found, values, [torch.tensor([[10.0], [11.0], [12.0]]), torch.tensor([[13.0]])])


def _exchange_with_ids(x: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    send = [[1, 2], [1, 0]]
    receive = [[1, 1], [2, 0]]
    ids = 2**31 - 1 - torch.arange(len(x)) - 10 * group.rank()
    values, ids = comm.all_to_all_with_ids(
        x, ids, receive[group.rank()], send[group.rank()], group, purpose
    )
    assert ids.dtype is torch.int64
    assert (2**31 - 1 - ids).tolist() == [[0, 10], [1, 2]][group.rank()]
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_ids_travel_together(ranks: Ranks, dtype: torch.dtype) -> None:
    """Values of any bits, also those that read as no number."""
    x = [torch.tensor([0.1, torch.inf, -0.0], dtype=dtype), torch.tensor([torch.nan], dtype=dtype)]
    u = [torch.tensor([10.0, 13.0], dtype=dtype), torch.tensor([11.0, 12.0], dtype=dtype)]
    found = ranks(2).run(_forward_and_backward, _exchange_with_ids, x, u)
    values = [torch.stack((x[0][0], x[1][0])), x[0][1:]]
    gradients = [torch.tensor([10.0, 11.0, 12.0], dtype=dtype), torch.tensor([13.0], dtype=dtype)]
    for (value, gradient), wanted, wanted_gradient in zip(found, values, gradients, strict=True):
        assert torch.equal(value.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert torch.equal(gradient, wanted_gradient)


def _exchange_nothing_from_rank_1(x: Tensor, group: ProcessGroup, purpose: Purpose) -> Tensor:
    send = [[0, 2], [0, 0]]
    receive = [[0, 0], [2, 0]]
    return comm.all_to_all(x, receive[group.rank()], send[group.rank()], group, purpose)


def test_all_to_all_with_a_rank_that_sends_and_one_that_receives_nothing(ranks: Ranks) -> None:
    x, nothing, u = torch.tensor([[1.0], [2.0]]), torch.zeros(0, 1), torch.tensor([[3.0], [4.0]])
    arguments = (_exchange_nothing_from_rank_1, [x, nothing], [nothing, u])
    found = ranks(2).run(_forward_and_backward, *arguments)
    _check(found, [nothing, x], [u, nothing])


@pytest.mark.parametrize(
    "operation", [comm.sum_gradient, comm.sum_forward, comm.sum_shards, comm.gather_sequence]
)
def test_one_rank_alone_passes_everything_on(ranks: Ranks, operation: Operation) -> None:
    _check(ranks(1).run(_forward_and_backward, operation, [A], [U]), [A], [U])


def _without_gradients() -> dict[str, Tensor]:
    rank = dist.get_rank()
    group = start(2, sequence_parallel=False).tensor
    shard = torch.tensor([[1, 2], [3, 4]]) + 10 * rank
    return {
        "gather_last_dim": comm.gather_last_dim(shard.float(), group, OTHER),
        "gather_rows": comm.gather_shards(shard, 0, group, OTHER),
        "gather_columns": comm.gather_shards(shard.t(), 1, group, OTHER),
        # Row p of the counts is for rank p.
        "exchange_counts": comm.exchange_counts(shard, group, OTHER),
        "exchange_strided_counts": comm.exchange_counts(shard.t(), group, OTHER),
    }


def test_gathers_and_counts(ranks: Ranks) -> None:
    first, second = ranks(2).run(_without_gradients)
    for found in (first, second):
        assert found["gather_last_dim"].tolist() == [[1, 2, 11, 12], [3, 4, 13, 14]]
        assert found["gather_rows"].tolist() == [[1, 2], [3, 4], [11, 12], [13, 14]]
        assert found["gather_columns"].tolist() == [[1, 3, 11, 13], [2, 4, 12, 14]]
    assert first["exchange_counts"].tolist() == [[1, 2], [11, 12]]
    assert second["exchange_counts"].tolist() == [[3, 4], [13, 14]]
    assert first["exchange_strided_counts"].tolist() == [[1, 3], [11, 13]]
    assert second["exchange_strided_counts"].tolist() == [[2, 4], [12, 14]]


def _reduce(tensor: int) -> dict[str, list[float]]:
    groups = start(tensor, sequence_parallel=False)
    x = torch.tensor([2.0**groups.rank, -1.0 * groups.rank]).requires_grad_()
    results = {
        "sum over tensor": comm.sum_over(x, groups.tensor, purpose=OTHER),
        "sum over both": comm.sum_over(x, groups.tensor, groups.data, purpose=OTHER),
        "max over data": comm.max_over(x, groups.data, purpose=OTHER),
        "max over both": comm.max_over(x, groups.tensor, groups.data, purpose=OTHER),
        "own": comm.sum_over(x, purpose=OTHER),
    }
    assert not any(result.requires_grad for result in results.values())
    results["own"].detach().zero_()
    assert x[0] == 2.0**groups.rank, "the input was written to"
    del results["own"]
    return {name: result.tolist() for name, result in results.items()}


def test_reductions_over_groups_in_turn(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks(4).run(_reduce, 2)):
        tensor = [3.0, -1.0] if rank < 2 else [12.0, -5.0]
        data = [4.0, 0.0] if rank % 2 == 0 else [8.0, -1.0]
        assert found == {
            "sum over tensor": tensor,
            "sum over both": [15.0, -6.0],
            "max over data": data,
            "max over both": [8.0, 0.0],
        }


def test_reductions_on_one_rank(ranks: Ranks) -> None:
    [found] = ranks(1).run(_reduce, 1)
    assert all(value == [1.0, 0.0] for value in found.values())
