"""What a rank knows of itself, as it tells the others."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from uoe_parallel.config.schema import RunConfig
from uoe_parallel.doctor import machine, network
from uoe_parallel.doctor.faults import Fault, Found, difference, gathered
from uoe_parallel.doctor.versions import apex_faults, code_fingerprint, installed_versions
from uoe_parallel.parallel.sameness import config_fields

MISTAKE = "file"
"""In the place of a config's values: what is wrong with it."""
SHARED_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_")
"""Beginnings of variables that decide how ranks talk and compute."""


@dataclass(frozen=True)
class Facts:
    """Of one rank."""

    rank: int
    host: str
    versions: Mapping[str, str]
    code: str
    """Fingerprint of the package."""
    config: Mapping[str, str]
    """The values of the config by dotted name, or why there are none under `MISTAKE`."""
    devices: Sequence[str]
    interfaces: Sequence[Mapping[str, Any]]
    taken: Mapping[str, str | None]
    """The interface that a backend takes, by the variable that would name it."""
    variables: Mapping[str, str]
    """The environment's, of `SHARED_VARIABLES`."""
    faults: Sequence[Fault]
    """That the rank sees by itself."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Facts:
        faults = [Fault(**fault) for fault in fields["faults"]]
        return cls(**{**fields, "faults": faults})


def own_facts(
    config: Mapping[str, str],
    *,
    rank: int,
    local_rank: int,
    local_ranks: int,
    several_nodes: bool,
) -> Facts:
    """Of this process, without a word to any other."""
    found = network.interfaces()
    devices = machine.devices()
    on_cuda = torch.cuda.is_available()
    taken = {network.GLOO: network.gloo_interface(os.environ, found, network.own_addresses())}
    if on_cuda:
        taken[network.NCCL] = network.nccl_interface(os.environ, found)
    faults = [
        *apex_faults(on_cuda=on_cuda),
        *machine.machine_faults(local_ranks, local_rank),
        *network.interface_faults(os.environ, found, taken, several_nodes=several_nodes),
    ]
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        versions=installed_versions(),
        code=code_fingerprint(),
        config=config,
        devices=devices,
        interfaces=[asdict(one) for one in found],
        taken=taken,
        variables={k: v for k, v in sorted(os.environ.items()) if k.startswith(SHARED_VARIABLES)},
        faults=faults,
    )


def compared(facts: Sequence[Facts]) -> list[Found]:
    """All faults that ranks see by themselves, and what of them differs."""
    found = gathered({own.rank: own.faults for own in facts})
    names = sorted({name for own in facts for name in own.versions})
    for name in names:
        versions = {own.rank: own.versions.get(name, "-") for own in facts}
        found += difference(name, versions, "install the same on every node: requirements.txt")
    codes = {own.rank: own.code[:12] for own in facts}
    found += difference("the code", codes, "bring the same revision of it to every node")
    found += _config_differences(facts)
    devices = {own.rank: own.devices[0].partition(",")[0] for own in facts}
    found += difference("the device", devices, "the slowest one sets the pace of all")
    for name in sorted({name for own in facts for name in own.variables}):
        if name in (network.GLOO, network.NCCL):
            continue  # nodes may name their interfaces differently
        values = {own.rank: own.variables.get(name, "unset") for own in facts}
        found += difference(name, values, "export the same on every node")
    return found


def _config_differences(facts: Sequence[Facts]) -> list[Found]:
    advice = "give every node the same file and the same overrides"
    if any(MISTAKE in own.config for own in facts):
        read = {own.rank: own.config.get(MISTAKE, "can be read") for own in facts}
        return difference("the config's file", read, advice)
    names = dict.fromkeys(name for own in facts for name in own.config)
    found = []
    for name in names:
        values = {own.rank: own.config.get(name, "absent") for own in facts}
        found += difference(f"the config's {name}", values, advice)
    return found


def config_values(config: RunConfig) -> dict[str, str]:
    """Every value by its dotted name, as JSON."""
    return {name: json.dumps(value) for name, value in config_fields(config).items()}
