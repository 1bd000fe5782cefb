"""Small messages between ranks, and errors that all ranks share.

`group` is everywhere a process group that carries CPU tensors (gloo, or nccl paired with gloo):
control messages need no GPU, and a rank that hashes terabytes must not trip nccl's watchdog.
None means that this process works alone.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.config.faults import show
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.purposes import Purpose, labelled

_RANKS_TOLD = 8


@dataclass(frozen=True)
class Difference:
    """A name that has not the same value on all ranks."""

    name: str
    holders: Sequence[tuple[Any, Sequence[int]]]
    """The values (JSON, None where a rank does not have the name) and the ranks that have each, in
    the order of their lowest ranks."""
    hosts: Sequence[str]
    """Of the lowest rank of each value."""

    def __str__(self) -> str:
        """`training.steps is 4 on ranks 0, 2 (first), 6 on rank 1 (second)`"""
        told = (
            f"{show(value)} on {_told(ranks)} ({host})"
            for (value, ranks), host in zip(self.holders, self.hosts, strict=True)
        )
        return f"{self.name} is {', '.join(told)}"


def _told(ranks: Sequence[int]) -> str:
    few = ", ".join(map(str, ranks[:_RANKS_TOLD]))
    more = len(ranks) - _RANKS_TOLD
    return f"rank{'s' * (len(ranks) > 1)} {few}{f' and {more} more' if more > 0 else ''}"


def rank_in(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def gather_json(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Every rank's `value` in rank order on rank 0; an empty list on the others. Collective.

    JSON instead of torch's object collectives, which pickle.
    """
    if group is None:
        return [value]
    return [_decode(message) for message in gather_bytes(_encode(value), group)]


def gather_bytes(message: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's `message`, uint8 of any length, in rank order on rank 0; an empty list on the
    others. Collective."""
    return labelled(Purpose.AGREEMENT, group, _gather, message, group)


def _gather(message: Tensor, group: ProcessGroup) -> list[Tensor]:
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(lengths, torch.tensor([message.numel()]), group=group)
    padded = torch.zeros(max(int(torch.cat(lengths).max()), 1), dtype=torch.uint8)
    padded[: message.numel()] = message
    if group.rank() != 0:
        dist.gather(padded, group=group, group_dst=0)
        return []
    rows = [torch.empty_like(padded) for _ in lengths]
    dist.gather(padded, rows, group=group, group_dst=0)
    return [row[: int(length)] for row, length in zip(rows, lengths, strict=True)]


def broadcast_json(value: Any, group: ProcessGroup | None) -> Any:
    """Rank 0's `value` on every rank; what the others pass is ignored. Collective."""
    if group is None:
        return value
    message = _encode(value if group.rank() == 0 else None)
    return _decode(labelled(Purpose.AGREEMENT, group, _broadcast, message, group))


def _broadcast(message: Tensor, group: ProcessGroup) -> Tensor:
    length = torch.tensor([message.numel()])
    dist.broadcast(length, group=group, group_src=0)
    if group.rank() != 0:
        message = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(message, group=group, group_src=0)
    return message


def first_difference(values: Mapping[str, Any], group: ProcessGroup | None) -> Difference | None:
    """The first name, in rank 0's order, whose value (JSON) is not the same on all ranks: the same
    answer on every rank. Collective.

    Only a digest of the values is sent if nothing differs.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    if broadcast_json(len(set(gather_json(digest, group))) < 2, group):
        return None
    own = {"values": dict(values), "host": socket.gethostname()}
    return Difference(**broadcast_json(_difference(gather_json(own, group)), group))


def _difference(reports: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What makes a `Difference`, of every rank's report; None of no reports."""
    for name in {name: None for report in reports for name in report["values"]}:
        holders: dict[str, tuple[Any, list[int]]] = {}
        for rank, report in enumerate(reports):
            value = report["values"].get(name)
            holders.setdefault(json.dumps(value, sort_keys=True), (value, []))[1].append(rank)
        if len(holders) > 1:
            hosts = [reports[ranks[0]]["host"] for _, ranks in holders.values()]
            return {"name": name, "holders": list(holders.values()), "hosts": hosts}
    return None


@contextmanager
def shared_fate(action: str, mend: str, group: ProcessGroup | None) -> Iterator[None]:
    """Run the block on every rank; if it fails on one, all raise the same error. Collective.

    The block itself must hold no collective. A UserError reaches every rank as it is; a failure
    of the file system becomes a UserError "<action>: <what happened where>. <mend>"; anything
    else is a bug of ours, and becomes an AssertionError.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # raised again below, on every rank
        own = error
    fault = None
    if isinstance(own, UserError):
        fault = {"mendable": True, "told": str(own), "host": socket.gethostname()}
    elif own is not None:
        mendable = isinstance(own, OSError | SafetensorError)
        fault = {"mendable": mendable, "text": f"{type(own).__name__}: {own}"}
    verdict = broadcast_json(_verdict(gather_json(fault, group)), group)
    if verdict is None:
        return
    if "told" in verdict:
        raise UserError(verdict["told"]) from own
    if verdict["mendable"]:
        raise UserError(f"{action}: {verdict['text']}. {mend}") from own
    raise AssertionError(f"{action}: {verdict['text']}") from own


def _verdict(reports: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Of all ranks' faults the one to tell: a bug before what may only follow from it."""
    faults = [(rank, fault) for rank, fault in enumerate(reports) if fault]
    if not faults:
        return None
    rank, fault = min(faults, key=lambda item: item[1]["mendable"])
    if "told" in fault:
        seen = f" (seen by rank {rank} on {fault['host']})" if rank > 0 else ""
        return fault | {"told": fault["told"] + seen}
    others = f" (and {len(faults) - 1} other ranks)" if len(faults) > 1 else ""
    return {"mendable": fault["mendable"], "text": f"rank {rank}: {fault['text']}{others}"}


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(message: Tensor) -> Any:
    return json.loads(message.numpy().tobytes())
