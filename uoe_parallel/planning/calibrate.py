"""Measures this machine, as ranks that share it see it, for a hardware profile."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from uoe_parallel.config import yaml_text
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import distributed
from uoe_parallel.planning.hardware import MEASURED, MEASURED_FILE, Hardware, Link
from uoe_parallel.verification.ranks import THREADS, Failure, LocalRanks

PRODUCTS = (256, 512, 1024)
"""Widths of the square matrices that are multiplied."""
COPIED = 1 << 26
"""Bytes of what is copied, more than caches hold."""
SMALL, LARGE = 1 << 10, 1 << 23
"""Bytes that a rank sends, for the latency and for the bandwidth of a link."""
ROUNDS = 7
TIMEOUT = 300.0
"""Seconds."""


def calibrate(ranks: int, path: Path = MEASURED_FILE) -> str:
    """Measure on `ranks` processes at once and write the profile to `path`; returns what it says.

    Ranks have the cores of this machine in equal shares, as in a run. Raises UserError if it can't
    be measured or written.
    """
    threads = os.environ.get(THREADS) or str(max(1, len(os.sched_getaffinity(0)) // ranks))
    with tempfile.TemporaryDirectory(prefix="calibrate-") as logs:
        outcome = LocalRanks().run(
            ranks,
            f"{__name__}:measure",
            int(threads),
            logs=Path(logs),
            timeout=TIMEOUT,
        )
    if isinstance(outcome, Failure):
        raise UserError(f"--calibrate: {outcome.mistake or outcome.summary}\n{outcome.details}")
    assert isinstance(outcome, dict)
    text = yaml_text.dump(Hardware.model_validate(outcome).model_dump())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--calibrate: {path} cannot be written: {error.strerror}") from None
    return f"{text}\nwritten to {path}"


def measure(threads: int) -> dict[str, Any]:
    """On every rank, all at the same time; the slowest counts."""
    torch.set_num_threads(threads)
    with distributed(timedelta(seconds=TIMEOUT)) as device:
        best, typical = _product_rates(device)
        link = _link(device)
        shared = dist.get_world_size()
        return {
            "name": MEASURED,
            "device": "cuda" if device.is_cuda else "cpu",
            "devices_per_node": shared,
            "flops": {"fp32": best} | ({"bf16": best} if device.is_cuda else {}),
            "achievable": min(1.0, typical / best),
            "memory": _memory(device, shared),
            "memory_bandwidth": _memory_bandwidth(device),
            "reserved_memory": 0,
            "fragmentation": 0.05,
            "intra_node": link.model_dump(),
            "inter_node": link.model_dump(),
        }


def _product_rates(device: Device) -> tuple[float, float]:
    """Operations per second of fp32 products: at the best size, and as a mean of all sizes."""
    rates = []
    for width in PRODUCTS:
        a, b = (torch.rand(width, width, device=device.torch_device) for _ in range(2))
        rates.append(2 * width**3 / _seconds(device, lambda a=a, b=b: a @ b))
    return max(rates), sum(rates) / len(rates)


def _memory_bandwidth(device: Device) -> float:
    source = torch.zeros(COPIED // 4, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * COPIED / _seconds(device, lambda: target.copy_(source))


def _link(device: Device) -> Link:
    """From all-reduces, as `time.transfer_seconds` counts them."""
    size = dist.get_world_size()
    if size == 1:
        return Link(bandwidth=_memory_bandwidth(device), latency=0.0)

    def seconds(payload: int) -> float:
        numbers = torch.zeros(payload // 4, device=device.torch_device)
        return _seconds(device, lambda: dist.all_reduce(numbers))

    hops, small, large = 2 * (size - 1), seconds(SMALL), seconds(LARGE)
    moved = hops / size * (LARGE - SMALL)
    return Link(bandwidth=moved / max(large - small, 1e-9), latency=small / hops)


def _memory(device: Device, shared: int) -> int:
    if device.is_cuda:
        return torch.cuda.get_device_properties(device.torch_device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // shared


def _seconds(device: Device, work: Callable[[], Any]) -> float:
    """The median of some rounds, on the rank where it is the longest."""
    work()
    taken = []
    for _ in range(ROUNDS):
        dist.barrier()
        device.synchronize()
        started = time.perf_counter()
        work()
        device.synchronize()
        taken.append(time.perf_counter() - started)
    longest = torch.tensor(median(taken), dtype=torch.float64, device=device.torch_device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)
