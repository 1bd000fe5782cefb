"""Keeping the routes of a step's micro-batches, and using kept ones in place of a block's own.

A routed block hands its mask to its tape and uses the mask that comes back. A tape belongs to one
block and one step. It knows the micro-batch of a call from the order of calls alone, which is that
of the micro-batches in forward and in recomputation. A block that recomputes its activations in
backward runs twice for each: first without gradients, later with them, maybe after forward passes
of further micro-batches (pipeline schedules). One that doesn't runs once, with gradients. Calls
with and without gradients are therefore counted apart.

Shape suffixes: S positions (or a shard of them), B sequences of a micro-batch, E experts, X bytes
that hold a bit for each of them, R sequences of all micro-batches.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class RouteTape(Protocol):
    """Called with the mask that a block chose (bool [S, B, E]); returns the one it is to use."""

    def __call__(self, mask_SBE: Tensor, /) -> Tensor: ...


def packed_size(num_experts: int) -> int:
    """Bytes of a token's packed mask."""
    return -(-num_experts // 8)


def pack(mask_SBE: Tensor) -> Tensor:
    """bool [..., E] to uint8 [..., X]: expert e is bit e % 8, counted from the lowest, of byte
    e // 8; bits beyond the experts are zero."""
    bits = F.pad(mask_SBE, (0, -mask_SBE.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits.to(torch.uint8) << _places(mask_SBE)).sum(-1, dtype=torch.uint8)


def unpack(routes_SBX: Tensor, num_experts: int) -> Tensor:
    """uint8 [..., X] back to bool [..., E]."""
    bits = (routes_SBX.unsqueeze(-1) >> _places(routes_SBX)) & 1
    return bits.flatten(-2)[..., :num_experts].bool().contiguous()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


class _Turns:
    """Which micro-batch a call is about."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = {False: 0, True: 0}
        """Calls without and with gradients."""

    def take(self) -> tuple[int, bool]:
        """The number of the micro-batch, and whether this is its first call."""
        with_gradients = torch.is_grad_enabled()
        number = self._taken[with_gradients]
        assert number < self._total, f"more passes than the step's {self._total} micro-batches"
        self._taken[with_gradients] += 1
        return number, number >= self._taken[not with_gradients]

    def check_finished(self) -> None:
        taken, total = self._taken, self._total
        assert taken[True] == total and taken[False] in (0, total), (
            f"{taken[True]} passes with gradients and {taken[False]} without for {total} "
            "micro-batches"
        )


class Recorder:
    """Keeps a block's own routes, which stay in use."""

    def __init__(self, micro_batches: int) -> None:
        self._turns = _Turns(micro_batches)
        self._routes: list[Tensor] = []

    def __call__(self, mask_SBE: Tensor) -> Tensor:
        number, first = self._turns.take()
        routes_SBX = pack(mask_SBE)
        if first:
            self._routes.append(routes_SBX)
        else:
            same = torch.equal(routes_SBX, self._routes[number])
            assert same, f"micro-batch {number} took other routes when it was recomputed"
        return mask_SBE

    def finish(self) -> Tensor:
        """The routes of the step, uint8 [R, S, X], micro-batch after micro-batch."""
        self._turns.check_finished()
        return torch.cat(self._routes, dim=1).transpose(0, 1)


class Player:
    """Holds a block's own routes against kept ones, and with `follow` puts those in their place.

    routes: uint8 [R, S, X], as a `Recorder` under the same layout would give them.
    """

    def __init__(self, routes_RSX: Tensor, micro_batch_size: int, *, follow: bool) -> None:
        batches = routes_RSX.transpose(0, 1).split(micro_batch_size, dim=1)
        self._routes = batches
        self._turns = _Turns(len(batches))
        self._follow = follow
        self._flipped = torch.zeros((), dtype=torch.int64, device=routes_RSX.device)

    def __call__(self, mask_SBE: Tensor) -> Tensor:
        number, first = self._turns.take()
        own_SBX, kept_SBX = pack(mask_SBE), self._routes[number]
        assert own_SBX.shape == kept_SBX.shape, (
            f"micro-batch {number} has routes of shape {tuple(own_SBX.shape)}, and those kept for "
            f"it have {tuple(kept_SBX.shape)}"
        )
        if first:
            self._flipped += (own_SBX != kept_SBX).any(-1).sum()
        return unpack(kept_SBX, mask_SBE.shape[-1]) if self._follow else mask_SBE

    def finish(self) -> Tensor:
        """How many of the step's R x S tokens would by themselves go elsewhere: int64 []."""
        self._turns.check_finished()
        return self._flipped
