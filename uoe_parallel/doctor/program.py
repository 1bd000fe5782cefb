"""Look at this node and this launch before a run does:

    python -m uoe_parallel.doctor [--config FILE] [--json FILE] [section.field=value ...]

Alone it looks at the node; under a launcher, started as the run would be, also at what ranks must
have in common and at the collectives of every group of the config's layout. Trains nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import ParallelConfig
from uoe_parallel.doctor.facts import MISTAKE, config_values, own_facts
from uoe_parallel.doctor.faults import Fault, gathered, told
from uoe_parallel.doctor.network import rendezvous_faults
from uoe_parallel.errors import USER_ERROR_EXIT_CODE, UserError
from uoe_parallel.parallel.groups import (
    distributed,
    local_size_from_environment,
    rank_from_environment,
    world_size_from_environment,
)
from uoe_parallel.parallel.layout import layout_faults

FAULTY = 1
"""Exit code if faults were found."""
WAIT = 20.0
"""Seconds that ranks are waited for."""
STORE_OF_LAUNCHER = "TORCHELASTIC_USE_AGENT_STORE"
"""True where torchrun itself listens at the rendezvous; else rank 0 does, once it starts."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uoe-doctor",
        description="Look at this node and this launch before a run does.",
        epilog="Example: torchrun --standalone --nproc-per-node 2 -m uoe_parallel.doctor "
        "--config configs/cpu_quickstart.yaml",
    )
    parser.add_argument("--config", type=Path, help="the run's YAML file: its layout is checked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT,
        metavar="SECONDS",
        help="how long to wait for other ranks (default: %(default)g)",
    )
    parser.add_argument(
        "--rendezvous",
        type=_host_and_port,
        metavar="HOST:PORT",
        help="where ranks will meet: check that this node gets there",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as node0:29400")
    return host.strip("[]"), int(port)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 1 if faults were found, 2 for a user's mistake."""
    options = parse_arguments(arguments)
    world, local = world_size_from_environment(), local_size_from_environment()
    config, parallel = _config(options, world)
    facts = own_facts(
        config,
        rank=rank_from_environment(),
        local_rank=int(os.environ.get("LOCAL_RANK") or 0),
        local_ranks=local,
        several_nodes=world > local,
    )
    try:
        faults = _way_to_others(facts.rank, options, several_nodes=world > local)
        if not faults:
            wait = timedelta(seconds=options.wait)
            with distributed(wait) as device:
                # DeepSpeed picks its accelerator when it is imported: after the device is chosen.
                from uoe_parallel.doctor.launch import examine_launch

                is_healthy = examine_launch(facts, parallel, options.json, device, wait)
                return 0 if is_healthy else FAULTY
    except UserError as error:
        if facts.rank == 0:
            print(f"uoe-doctor: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    except RuntimeError as error:  # of torch.distributed
        faults = [_lost(error, options.wait)]
    # Nobody else can be told: each rank speaks for itself.
    found = gathered({facts.rank: [*facts.faults, *faults]})
    print(told(found), file=sys.stderr, flush=True)
    return FAULTY


def _config(options: argparse.Namespace, world: int) -> tuple[Mapping[str, str], dict[str, Any]]:
    """Of this rank: the config's values, or what is wrong with it, and its section `parallel`,
    empty where there are no ranks to lay out."""
    if options.config is None:
        return {}, ParallelConfig().model_dump() if world > 1 else {}
    try:
        checks = [partial(layout_faults, world_size=world)] if world > 1 else []
        config = load_config(options.config, options.overrides, checks)
    except UserError as error:
        return {MISTAKE: str(error)}, {}
    return config_values(config), config.parallel.model_dump() if world > 1 else {}


def _way_to_others(rank: int, options: argparse.Namespace, *, several_nodes: bool) -> list[Fault]:
    """What keeps this rank from the place where ranks meet, as far as it can look by itself."""
    if options.rendezvous is not None:
        return rendezvous_faults(*options.rendezvous, several_nodes=True, wait=options.wait)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    listens_itself = rank == 0 and os.environ.get(STORE_OF_LAUNCHER) != "True"
    if "RANK" not in os.environ or address is None or port is None or listens_itself:
        return []
    return rendezvous_faults(address, int(port), several_nodes=several_nodes, wait=options.wait)


def _lost(error: Exception, wait: float) -> Fault:
    """Of ranks that did not meet, or did not all come to a collective."""
    place = f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')}"
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return Fault(
        f"not all ranks met at {place}, or kept up, within {wait:g} s: {text}",
        "look at what the other ranks print: whoever is not there has the cause",
    )
