"""Groups agree with the layout, and ranks are found whoever launched them."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.harness import Ranks
from tests.unions import start
from uoe_parallel.parallel.groups import (
    TIMEOUT,
    distributed,
    local_size_from_environment,
    rank_from_environment,
    start_aside_group,
    start_groups,
    world_size_from_environment,
)
from uoe_parallel.parallel.layout import ParallelLayout


def _places(tensor: int) -> dict[str, object]:
    # DeepSpeed picks its accelerator when it is imported.
    from uoe_parallel.parallel.deepspeed_groups import ModelParallelUnit

    groups = start(tensor, sequence_parallel=False)
    mpu = ModelParallelUnit(groups)
    return {
        "world": dist.get_process_group_ranks(groups.world),
        "tensor": dist.get_process_group_ranks(groups.tensor),
        "data": dist.get_process_group_ranks(groups.data),
        "rank": groups.rank,
        "tensor_rank": groups.tensor_rank,
        "data_rank": groups.data_rank,
        "is_main": groups.is_main,
        "mpu": [
            mpu.get_model_parallel_world_size(),
            mpu.get_model_parallel_rank(),
            dist.get_process_group_ranks(mpu.get_model_parallel_group()),
            mpu.get_data_parallel_world_size(),
            mpu.get_data_parallel_rank(),
            dist.get_process_group_ranks(mpu.get_data_parallel_group()),
        ],
        "mpu_source": mpu.get_tensor_model_parallel_src_rank(),
        "mpu_names_agree": (
            mpu.get_tensor_model_parallel_world_size() == mpu.get_model_parallel_world_size()
            and mpu.get_tensor_model_parallel_rank() == mpu.get_model_parallel_rank()
            and mpu.get_tensor_model_parallel_group() is mpu.get_model_parallel_group()
            and mpu.get_data_parallel_group_ranks()
            == dist.get_process_group_ranks(mpu.get_data_parallel_group())
        ),
        "looks_like_ulysses": any("sequence" in name for name in dir(mpu)),
    }


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_groups_are_those_of_the_layout(ranks: Ranks, world_size: int, tensor: int) -> None:
    layout = ParallelLayout(world_size, tensor, 1, tensor, sequence_parallel=False, zero_stage=0)
    everybody = range(world_size)
    for rank, found in enumerate(ranks(world_size).run(_places, tensor)):
        tensor_rank, data_rank = layout.coordinates(rank).tensor, layout.coordinates(rank).data
        tensor_group = [r for r in everybody if layout.coordinates(r).data == data_rank]
        data_group = [r for r in everybody if layout.coordinates(r).tensor == tensor_rank]
        assert found == {
            "world": list(everybody),
            "tensor": tensor_group,
            "data": data_group,
            "rank": rank,
            "tensor_rank": tensor_rank,
            "data_rank": data_rank,
            "is_main": rank == 0,
            "mpu": [tensor, tensor_rank, tensor_group, layout.data, data_rank, data_group],
            "mpu_source": tensor_group[0],
            "mpu_names_agree": True,
            "looks_like_ulysses": False,
        }


@pytest.mark.parametrize(
    ("environment", "rank", "world_size"),
    [
        ({}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 3, 8),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 1, 2),
        # torchrun started by mpirun, one per node.
        (
            {
                "RANK": "5",
                "WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
            },
            5,
            8,
        ),
    ],
    ids=["alone", "torchrun", "mpirun", "both"],
)
def test_ranks_are_read_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int, world_size: int
) -> None:
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (rank_from_environment(), world_size_from_environment()) == (rank, world_size)


@pytest.mark.parametrize(
    ("environment", "local_size"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 1),
    ],
    ids=["unsaid", "torchrun", "deepspeed", "mpirun"],
)
def test_ranks_of_a_node_are_read_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], local_size: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "8", **environment}.items():
        monkeypatch.setenv(name, value)
    assert local_size_from_environment() == local_size


def _timeouts() -> set[timedelta]:
    """Of the groups of a layout, and of the one beside it."""
    layout = ParallelLayout(2, 2, 1, 2, sequence_parallel=False, zero_stage=0)
    groups = start_groups(layout)
    every = (groups.tensor, groups.data, groups.pipe, start_aside_group())
    return {group._get_backend(torch.device("cpu")).options._timeout for group in every}


def test_ranks_wait_in_all_groups_as_long_as_in_the_world(ranks: Ranks) -> None:
    for found in ranks(2).run(_timeouts):
        assert found == {TIMEOUT}


LAUNCHERS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _start_again(*, launched: bool) -> tuple[int, str, bool]:
    """From the launcher's variables, or as a process that nobody launched."""
    dist.destroy_process_group()
    if not launched:
        for name in LAUNCHERS_VARIABLES:
            del os.environ[name]
    before = {name: os.environ.get(name) for name in LAUNCHERS_VARIABLES}
    with distributed() as device:
        ones = torch.ones(1)
        dist.all_reduce(ones)
        summed, backend = int(ones.item()), device.backend
        assert not device.is_cuda
    assert {name: os.environ.get(name) for name in LAUNCHERS_VARIABLES} == before
    return summed, backend, dist.is_initialized()


@pytest.mark.parametrize(("launched", "world_size"), [(True, 2), (False, 1)])
def test_distributed_lasts_as_long_as_the_block(
    ranks: Ranks, launched: bool, world_size: int
) -> None:
    found = ranks(2).run(_start_again, launched=launched)
    assert found == [(world_size, "gloo", False)] * 2


def _fail_inside() -> bool:
    dist.destroy_process_group()
    with pytest.raises(ZeroDivisionError), distributed():
        raise ZeroDivisionError
    return dist.is_initialized()


def test_distributed_ends_with_an_error_too(ranks: Ranks) -> None:
    assert ranks(2).run(_fail_inside) == [False, False]
