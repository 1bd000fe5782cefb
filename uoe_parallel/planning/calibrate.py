"""Measures this machine, or all nodes of a launch, as the ranks of a run see them, for a hardware
profile."""

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
from torch.distributed import ProcessGroup

from uoe_parallel.config import yaml_text
from uoe_parallel.config.schema import ParallelConfig, RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.experts.backends import pick_backend
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import (
    distributed,
    local_size_from_environment,
    start_groups,
    world_size_from_environment,
)
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.planning.hardware import MEASURED, MEASURED_FILE, Hardware, Link
from uoe_parallel.verification.ranks import THREADS, Failure, LocalRanks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRODUCTS = (256, 512, 1024)
"""Widths of the square matrices that are multiplied."""
COPIED = 1 << 26
"""Bytes of what is copied, more than caches hold."""
LAYERS = (1, 5)
"""Of the models whose difference is what a layer costs."""
SMALL, LARGE = 1 << 10, 1 << 23
"""Bytes that a rank sends, for the latency and for the bandwidth of a link."""
ROUNDS = 7
TIMEOUT = 300.0
"""Seconds."""


def calibrate(ranks: int, path: Path = MEASURED_FILE) -> str:
    """Measure and write the profile to `path`; returns what it says.

    Alone, `ranks` processes of this machine are started, with its cores in equal shares, as in a
    run. A process of a launcher's measures with the others, links between nodes too, and rank 0
    writes. Raises UserError if it can't be measured or written.
    """
    launched = world_size_from_environment() > 1
    threads = _threads(local_size_from_environment() if launched else ranks)
    text = measure(threads, str(path)) if launched else _started(ranks, threads, path)
    return f"{text}\nwritten to {path}"


def _started(ranks: int, threads: int, path: Path) -> str:
    """What `measure` returns of local ranks that are started for it."""
    with tempfile.TemporaryDirectory(prefix="calibrate-") as logs:
        outcome = LocalRanks().run(
            ranks,
            f"{__name__}:measure",
            threads,
            str(path.absolute()),
            logs=Path(logs),
            timeout=TIMEOUT,
        )
    if isinstance(outcome, Failure):
        raise UserError(outcome.mistake or f"--calibrate: {outcome.summary}\n{outcome.details}")
    assert isinstance(outcome, str)
    return outcome


def _threads(ranks: int) -> int:
    """Of each of `ranks` processes that share this machine."""
    cores = len(os.sched_getaffinity(0))
    return int(os.environ.get(THREADS) or max(1, cores // ranks))


def measure(threads: int, path: str) -> str:
    """On every rank, all at the same time; the slowest counts. Rank 0 writes the profile to `path`,
    and all return its text."""
    torch.set_num_threads(threads)
    with distributed(timedelta(seconds=TIMEOUT)) as device:
        precisions = ("bf16", "fp32") if device.is_cuda else ("fp32",)  # a CPU's bf16 is for tests
        rates = {name: _product_rates(device, DTYPES[name]) for name in precisions}
        best, typical = rates[precisions[0]]
        local = local_size_from_environment()
        node, across = link_groups(local)
        intra = _link(device, node)
        found = {
            "name": MEASURED,
            "device": "cuda" if device.is_cuda else "cpu",
            "devices_per_node": local,
            "flops": {name: peak for name, (peak, _) in rates.items()},
            "achievable": min(1.0, typical / best),
            "layer_overhead": _layer_overhead(device),
            "memory": _memory(device, local),
            "memory_bandwidth": _memory_bandwidth(device),
            "reserved_memory": 0,
            "fragmentation": 0.05,
            "intra_node": intra.model_dump(),
            "inter_node": (_link(device, across) if across.size() > 1 else intra).model_dump(),
        }
        text = yaml_text.dump(Hardware.model_validate(found).model_dump())
        action = f"--calibrate: {path} cannot be written"
        with shared_fate(action, "Run it where there is room to write", dist.group.WORLD):
            if dist.get_rank() == 0:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text(text, encoding="utf-8")
        return text


def link_groups(local: int) -> tuple[ProcessGroup, ProcessGroup]:
    """The ranks of this rank's node, and those in its place on the others: groups of an axis share
    the links of a node, as they do in a run."""
    world, rank = dist.get_world_size(), dist.get_rank()
    nodes = [list(range(first, first + local)) for first in range(0, world, local)]
    places = [list(range(place, world, local)) for place in range(local)]
    own: list[ProcessGroup] = []
    for ranks in (*nodes, *places):
        group = dist.new_group(ranks)
        if rank in ranks:
            assert isinstance(group, ProcessGroup)
            own.append(group)
    node, across = own
    return node, across


def _product_rates(device: Device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations per second of products: at the best size, and as a mean of all sizes."""
    rates = []
    for width in PRODUCTS:
        a, b = (torch.rand(width, width, device=device.torch_device).to(dtype) for _ in range(2))
        rates.append(2 * width**3 / _seconds(device, lambda a=a, b=b: a @ b))
    return max(rates), sum(rates) / len(rates)


def _layer_overhead(device: Device) -> float:
    """From models of so few tokens that little else is done, of which one is deeper."""
    # Imported here because the libraries below pick their accelerator when they are imported.
    from uoe_parallel.model.language_model import LanguageModel

    def config(layers: int) -> RunConfig:
        model = {"num_layers": layers, "hidden_size": 32, "ffn_size": 64, "num_heads": 8}
        return RunConfig.model_validate(
            {
                "run_dir": "",
                "model": model | {"sequence_length": 32},
                "feed_forward": {"top_k": 2},
                "attention": {"routed_layers": "all", "top_k": 2},
                "data": {"train": ""},
                "training": {
                    "steps": 1,
                    "global_batch_size": 1,
                    "micro_batch_size": 1,
                    "learning_rate": 1.0,
                },
            }
        )

    groups = start_groups(ParallelLayout.from_config(ParallelConfig(), dist.get_world_size()))
    backend, _ = pick_backend(device.torch_device, torch.float32, "auto", groups.world)
    tokens_BS = torch.zeros(1, 32, dtype=torch.int64, device=device.torch_device)

    def seconds(layers: int) -> float:
        model = LanguageModel(
            config(layers), groups, vocab_size=8, used_vocab_size=8, backend=backend
        ).to(device.torch_device)
        return _seconds(device, lambda: model(tokens_BS, tokens_BS).sum().backward())

    few, many = LAYERS
    return max(0.0, seconds(many) - seconds(few)) / (many - few)


def _memory_bandwidth(device: Device) -> float:
    source = torch.zeros(COPIED // 4, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * COPIED / _seconds(device, lambda: target.copy_(source))


def _link(device: Device, group: ProcessGroup) -> Link:
    """From all-reduces of all groups of an axis at once, as `time.transfer_seconds` counts them."""
    size = group.size()
    if size == 1:
        return Link(bandwidth=_memory_bandwidth(device), latency=0.0)

    def seconds(payload: int) -> float:
        numbers = torch.zeros(payload // 4, device=device.torch_device)
        return _seconds(device, lambda: dist.all_reduce(numbers, group=group))

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
