"""What a process on a CPU does with memory that is freed."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource

import torch

from uoe_parallel.parallel.device import use_device


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


use_device(0)
print(min(faults() for _ in range(8)))
"""
"""Pages that had to be brought in for a tensor of 32 MiB, of 8192, after some of that size were
freed. In a process of its own: others have holes of all sizes."""


def test_freed_memory_is_kept_for_the_next_activation() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout.splitlines()[-1]) < 100
