"""Boxes of parameters in their full weights, and weights gathered and loaded by them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tests.harness import Ranks
from tests.unions import start
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.sharding import (
    Shard,
    boxes,
    gather_full,
    load_full,
    named_shards,
    parameter_shape,
    partition_dim,
    shard_of,
)


@dataclass(frozen=True)
class _Place:
    """A rank's place in a group: all that boxes depend on."""

    of: int
    at: int

    def size(self) -> int:
        return self.of

    def rank(self) -> int:
        return self.at


def _group(size: int, rank: int) -> ProcessGroup:
    return cast(ProcessGroup, _Place(size, rank))


def _parameter(shape: tuple[int, ...], dim: int | None) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape))
    if dim is not None:
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
    return parameter


@st.composite
def parameters(draw: st.DrawFn) -> tuple[tuple[int, ...], int | None]:
    """A local shape and the dimension that is cut."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return shape, draw(st.none() | st.integers(0, len(shape) - 1))


@given(parameters(), st.integers(1, 5))
def test_boxes_of_all_ranks_tile_the_full_weight(
    case: tuple[tuple[int, ...], int | None], size: int
) -> None:
    shape, dim = case
    shards = [shard_of(_parameter(shape, dim), _group(size, rank)) for rank in range(size)]
    [global_shape] = {shard.global_shape for shard in shards}
    covered = torch.zeros(global_shape, dtype=torch.int64)
    for shard in shards:
        assert shard.shape == shape == tuple(covered[shard.index].shape)
        covered[shard.index] += 1
    # A parameter that is not cut is whole on every rank.
    assert (covered == (size if dim is None else 1)).all()
    assert covered.numel() == torch.Size(shape).numel() * (1 if dim is None else size)


def test_box_by_hand() -> None:
    shard = shard_of(_parameter((2, 3), 1), _group(4, 2))
    assert shard == Shard(shape=(2, 3), global_shape=(2, 12), offsets=(0, 6))
    full = torch.arange(24).view(2, 12)
    assert full[shard.index].tolist() == [[6, 7, 8], [18, 19, 20]]


def test_a_plain_parameter_is_whole() -> None:
    assert partition_dim(torch.zeros(2)) is None
    marked = _parameter((2, 3), None)
    set_tensor_model_parallel_attributes(marked, is_parallel=False, dim=0, stride=1)
    assert partition_dim(marked) is None


def test_shape_outlives_data_that_zero_took_away() -> None:
    parameter = _parameter((2, 3), 0)
    parameter.ds_shape = torch.Size((2, 3))  # pyright: ignore[reportAttributeAccessIssue]
    parameter.data = torch.empty(0)
    assert parameter_shape(parameter) == (2, 3)
    assert shard_of(parameter, _group(2, 1)) == Shard((2, 3), (4, 3), (2, 0))


def _alone() -> ParallelGroups:
    layout = ParallelLayout(1, 1, 1, 1, sequence_parallel=False, zero_stage=0)
    group = _group(1, 0)
    return ParallelGroups(layout, 0, group, group, group, group, group, group)


def test_a_tied_parameter_is_listed_once() -> None:
    model = nn.Module()
    model.first, model.other = nn.Linear(2, 3, bias=False), nn.Linear(2, 3)
    model.other.weight = model.first.weight
    found = {name: shard.shape for name, _, shard in named_shards(model, _alone())}
    assert found == {"first.weight": (3, 2), "other.bias": (3,)}


def _load_and_gather(dims: list[int | None], fulls: list[Tensor]) -> list[dict[str, Tensor]]:
    groups = start(torch.distributed.get_world_size(), sequence_parallel=False)
    results = []
    for dim, full in zip(dims, fulls, strict=True):
        shape = list(full.shape)
        if dim is not None:
            shape[dim] //= groups.tensor.size()
        parameter = _parameter(tuple(shape), dim)
        load_full(parameter, full, groups.tensor)
        gradient = parameter.detach() * 2
        whole = gather_full(parameter, groups.tensor)
        doubled = gather_full(parameter, groups.tensor, gradient)
        results.append({"local": parameter.detach().clone(), "whole": whole, "doubled": doubled})
        # What was gathered is the caller's own.
        with torch.no_grad():
            parameter.zero_()
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_full_weights_are_loaded_and_gathered(ranks: Ranks, size: int) -> None:
    dims = [0, 1, None]
    fulls = [torch.arange(48.0).view(8, 6).repeat(1, 2) + i for i in range(3)]
    for rank, results in enumerate(ranks(size).run(_load_and_gather, dims, fulls)):
        for dim, full, result in zip(dims, fulls, results, strict=True):
            local = full if dim is None else full.chunk(size, dim)[rank]
            assert torch.equal(result["local"], local)
            assert torch.equal(result["whole"], full)
            assert torch.equal(result["doubled"], full * 2)


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError):
        load_full(_parameter((2, 3), 0), torch.zeros(2, 3), _group(2, 0))


@given(st.lists(st.integers(1, 4), max_size=3), st.data())
def test_boxes_are_the_elements_of_a_range(sizes: list[int], data: st.DataObject) -> None:
    shape = tuple(sizes)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, whole.numel()))
    size = data.draw(st.integers(0, whole.numel() - start))
    found = []
    for box, at in boxes(shape, start, size):
        edges = zip(box.offsets, box.shape, strict=True)
        values = whole[tuple(slice(first, first + length) for first, length in edges)].flatten()
        assert at == len(found) and values.numel() > 0
        found += values.tolist()
    assert found == list(range(start, start + size))


def test_boxes_of_a_matrix_are_few() -> None:
    few = [len(list(boxes((9, 7), 1, size))) for size in (0, 5, 6, 7, 30, 62)]
    assert few == [0, 1, 1, 2, 3, 2]
    assert len(list(boxes((9, 7), 7, 56))) == 1
