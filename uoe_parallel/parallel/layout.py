"""Sizes and ranks of every parallel axis: the only place that computes and checks them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from uoe_parallel.config.faults import Fault
from uoe_parallel.config.schema import ParallelConfig, RunConfig


@dataclass(frozen=True)
class ParallelLayout:
    """How `world_size` ranks share a model.

    Rank = data_rank * tensor + tensor_rank, the order of megatron-core's groups: a tensor group
    is a run of neighbouring ranks, so that it stays inside a node.
    """

    world_size: int
    tensor: int
    sequence_parallel: bool
    zero_stage: int

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> ParallelLayout:
        """The layout of a config that `layout_faults` found fit for `world_size` ranks."""
        assert world_size % parallel.tensor == 0
        return cls(
            world_size=world_size,
            tensor=parallel.tensor,
            sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
            zero_stage=parallel.zero_stage,
        )

    @property
    def data(self) -> int:
        """Number of data-parallel replicas of the model."""
        return self.world_size // self.tensor

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        return rank // self.tensor


def layout_faults(config: RunConfig, world_size: int) -> Iterator[Fault]:
    """What keeps `config` from running on `world_size` ranks."""
    tensor = config.parallel.tensor
    if world_size % tensor:
        yield Fault(
            ("parallel.tensor",),
            tensor,
            f"does not divide the world size of {world_size} ranks",
            f"start a multiple of {tensor} ranks or set parallel.tensor to a divisor of "
            f"{world_size}",
        )
        return
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    data = world_size // tensor
    if batch % micro == 0 and batch % (micro * data):
        yield Fault(
            ("training.global_batch_size", "training.micro_batch_size", "parallel.tensor"),
            batch,
            f"is not a multiple of micro_batch_size x data-parallel size = {micro} x {data}",
            f"use a multiple of {micro * data}",
        )
