"""What runs inside a rank process for the tests of planning, and machines of round numbers."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch.distributed as dist

from uoe_parallel.analysis.simulate import Simulation, build_stage, simulate_world, simulated_groups
from uoe_parallel.analysis.work import expected_exchanges
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.layout import (
    ParallelLayout,
    candidate_layouts,
    why_not,
)
from uoe_parallel.planning.hardware import Hardware
from uoe_parallel.planning.plan import Plan, plan
from uoe_parallel.planning.search import Search, search
from uoe_parallel.planning.stage import RECOMPUTES
from uoe_parallel.planning.variants import Choice

MACHINE: dict[str, Any] = {
    "name": "round",
    "device": "cpu",
    "devices_per_node": 4,
    "flops": {"fp32": 1e12},
    "achievable": 0.5,
    "memory": 10**11,
    "memory_bandwidth": 1e11,
    "layer_overhead": 0.0,
    "reserved_memory": 0,
    "fragmentation": 0.0,
    "intra_node": {"bandwidth": 1e10, "latency": 1e-6},
    "inter_node": {"bandwidth": 1e9, "latency": 1e-5},
}


def machine(**changes: Any) -> Hardware:
    return Hardware.model_validate(MACHINE | changes)


def plan_alone(config: RunConfig, world_size: int, hardware: Hardware) -> Plan:
    """In a rank process, which has a process group."""
    dist.destroy_process_group()
    return plan(config, world_size, hardware)


def plan_and_simulate(
    config: RunConfig, world_size: int, hardware: Hardware
) -> tuple[Plan, list[Simulation]]:
    """And the simulations of the plan's ranks, with the exchanges that are expected."""
    planned = plan_alone(config, world_size, hardware)
    simulations = []
    for stage in planned.stages:
        with simulated_groups(planned.layout, stage.rank) as groups:
            exchanges = expected_exchanges(build_stage(config, groups), config)
        simulations.append(simulate_world(config, world_size, stage.rank, exchanges=exchanges))
    return planned, simulations


def search_alone(config: RunConfig, world_size: int, hardware: Hardware) -> Search:
    dist.destroy_process_group()
    return search(config, world_size, hardware)


def search_by_force(
    config: RunConfig, world_size: int, hardware: Hardware
) -> tuple[Search, dict[str, float]]:
    """A search, and the seconds of the fastest plan that fits, by layout, of all there are."""
    found = search_alone(config, world_size, hardware)
    fastest: dict[str, float] = {}
    sizes = [1, 2, 4, 8]
    for parallel in candidate_layouts(world_size):
        layout = ParallelLayout.from_config(parallel, world_size)
        if layout.tensor > hardware.devices_per_node:
            continue
        for size, recompute in product(sizes, RECOMPUTES):
            changed = Choice(parallel, size, recompute).of(config)
            batch = changed.training.global_batch_size
            if why_not(changed, world_size) or batch % (size * layout.data):
                continue
            planned = plan(changed, world_size, hardware)
            if planned.fits:
                name, seconds = str(layout), planned.time.seconds
                fastest[name] = min(seconds, fastest.get(name, seconds))
    return found, fastest
