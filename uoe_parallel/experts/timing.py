"""How long backends take for the same product on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.distributed import ProcessGroup

from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose

if TYPE_CHECKING:
    from uoe_parallel.experts.backends import Backend

ROUNDS = 6
ROWS = (0, 64, 96, 128, 128, 160, 192, 256)
"""Of each expert: uneven, as routes are."""
WIDTHS = (256, 128)
"""Of the rows, and of an expert's slice."""


def time_products(
    backends: Mapping[str, Backend],
    device: torch.device,
    dtype: torch.dtype,
    group: ProcessGroup | None,
) -> dict[str, float]:
    """Seconds of a small product, forward and backward, with each backend.

    What the first rank of `group` measured, told to all, so that all decide alike: collective over
    it. Without a group what this process measured.
    """
    seconds = dict.fromkeys(backends, float("inf"))
    for _ in range(ROUNDS):  # in turn, so that what slows the machine slows all alike
        for name, backend in backends.items():
            seconds[name] = min(seconds[name], seconds_of_product(backend, device, dtype))
    told = torch.tensor([*seconds.values()], dtype=torch.float64, device=device)
    if group is not None:
        comm.broadcast(told, 0, group, Purpose.SETUP)
    return dict(zip(seconds, told.tolist(), strict=True))


def seconds_of_product(backend: Backend, device: torch.device, dtype: torch.dtype) -> float:
    """Of one pass of each kind: the result, and the gradients of the rows and of the weights, which
    lie as in Megatron's column-parallel linear."""
    rows_NK = torch.ones(sum(ROWS), WIDTHS[0], device=device, dtype=dtype)
    weight_EMK = torch.ones(len(ROWS), *WIDTHS[::-1], device=device, dtype=dtype)
    counts_E = torch.tensor(ROWS, device=device)
    start = _now(device)
    y_NM = backend.products(rows_NK, weight_EMK.transpose(1, 2), counts_E)
    backend.products(y_NM, weight_EMK, counts_E)
    backend.outer_products(torch.empty_like(weight_EMK), y_NM, rows_NK, counts_E)
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
