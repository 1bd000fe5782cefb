"""Measuring sessions of tiny layers, made on every rank."""

from __future__ import annotations

import torch.distributed as dist

from uoe_parallel.benchmark.session import Session, Sizes
from uoe_parallel.experts.backends import LoopBackend
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.groups import start_groups
from uoe_parallel.parallel.layout import ParallelLayout

SIZES = Sizes(tokens=32, sequence=16, hidden=32, ffn=64, experts=8, top_k=2, heads=4)


def session(sizes: Sizes = SIZES) -> Session:
    """Of two rounds, over all ranks of the world."""
    device, world = use_device(0), dist.get_world_size()
    groups = start_groups(ParallelLayout(world, world, 1, world, world > 1, 0))
    return Session(groups, device, sizes, LoopBackend(), rounds=2, warmup=1)
