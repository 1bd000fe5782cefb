"""What a rank of a measured section does."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from uoe_parallel.benchmark.sizes import Sizes
from uoe_parallel.parallel.groups import distributed, start_groups, world_size_from_environment
from uoe_parallel.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Measured:
    """What a section came to."""

    entries: list[dict[str, Any]]
    threads: int
    """Of each rank."""
    device: str
    products: str
    """What was picked for this project's experts."""
    incomparable: str | None = None
    """Why nothing was measured."""


def measure(function: str, sizes: Sizes, rounds: int, timeout: float) -> Measured:
    """Call "package.module:function", a section's, with a session of all ranks.

    For every rank of a world that the environment describes as torchrun does. `timeout`: seconds
    that a collective may take.
    """
    world = world_size_from_environment()
    layout = ParallelLayout(
        world_size=world,
        tensor=world,
        pipeline=1,
        expert=world,
        sequence_parallel=world > 1,
        zero_stage=0,
    )
    with distributed(timedelta(seconds=timeout)) as device:
        # DeepSpeed picks its accelerator when it is imported: after the device is chosen.
        from uoe_parallel.benchmark.comparable import IncomparableError
        from uoe_parallel.benchmark.session import DTYPE, Session
        from uoe_parallel.experts.backends import pick_backend

        groups = start_groups(layout)
        backend, products = pick_backend(device.torch_device, DTYPE, "auto", groups.world)
        session = Session(groups, device, sizes, backend, rounds)
        entries, incomparable = [], None
        try:
            entries = pkgutil.resolve_name(function)(session)
        except IncomparableError as error:
            incomparable = str(error)
        where = torch.get_num_threads(), str(device.torch_device), products
        return Measured(entries, *where, incomparable)
