"""What a process on a CPU does with memory that is freed."""

from __future__ import annotations

import resource

import torch

from tests.harness import Ranks
from uoe_parallel.parallel.device import use_device


def faults_of_a_later_activation() -> int:
    """Pages brought in for a tensor of 32 MiB, after some of that size were freed."""
    use_device(0)
    size = 2**25
    for _ in range(3):  # until there is a hole in which one fits aligned
        torch.ones(size, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept_for_the_next_activation(ranks: Ranks) -> None:
    [faults] = ranks(1).run(faults_of_a_later_activation)
    assert faults < 100  # of 8192 pages
