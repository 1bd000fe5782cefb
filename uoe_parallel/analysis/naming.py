"""The name of a collective's group, and what megatron-core and DeepSpeed call theirs for."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from uoe_parallel.analysis.transfer import group_ranks
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Phase, Purpose, current_phase, current_purpose

_SCALAR = 8
"""Bytes of DeepSpeed's largest message of one number, an fp64. Gradients come in larger ones."""


class Naming:
    """What this rank's collectives are called. Without `groups` only those with a label have a
    purpose other than `Purpose.OTHER`."""

    def __init__(self, groups: ParallelGroups | None) -> None:
        self._rank = dist.get_rank()
        self._ranks: dict[ProcessGroup, tuple[int, ...]] = {}
        self._axes: dict[tuple[int, ...], str] = {}
        self._named: dict[ProcessGroup, str] = {}
        self._groups = groups
        self._pipe: tuple[int, ...] = ()
        self._stage3 = self._reduces_in_backward = False
        if groups is None:
            return
        axes = group_ranks(groups)
        self._pipe = axes["pipe"]
        # Of names with equal ranks the narrowest: "world" for a group that is all ranks by design.
        ends = [axis for axis in axes if axis not in ("world", "model")]
        for axis in reversed([*ends, "model", "world"]):
            if axis in axes:
                self._axes[axes[axis]] = axis
        for axis in ("expert_data", "expert", "pipe", "data", "tensor", "world"):
            if axis in axes:
                self._named[getattr(groups, axis)] = axis
        self._stage3 = groups.layout.zero_stage == 3
        self._reduces_in_backward = groups.layout.zero_stage >= 2

    def ranks(self, group: ProcessGroup) -> tuple[int, ...]:
        """Of `group`, in its order."""
        if (ranks := self._ranks.get(group)) is None:
            ranks = self._ranks[group] = tuple(dist.get_process_group_ranks(group))
        return ranks

    def axis(self, group: ProcessGroup, ranks: tuple[int, ...]) -> str:
        """A name of `group_ranks`: the group's own, or of a group of those ranks; "other" if there
        is none. Of a send's two `ranks`, of their pair."""
        own = self._named.get(group) if len(ranks) == group.size() else None
        if own is None or own == "pipe":  # the two ends of a send may be a whole pipeline
            own = self._axes.get(ranks, own)
        return own or "other"

    def purpose(
        self, operation: str, group: ProcessGroup, ranks: tuple[int, ...], payload: int
    ) -> Purpose:
        """By the label, or by rules of what the libraries do in a training step."""
        labelled = current_purpose(group)
        if labelled is not None:
            return labelled
        if self._groups is None:
            return Purpose.OTHER
        match operation:
            case "send" | "recv":
                return self._between_stages(operation, ranks)
            case "all_gather":
                whole = self._stage3 and current_phase() == "step"
                return Purpose.KEPT_WEIGHTS if whole else Purpose.WEIGHTS
            case "reduce_scatter":
                return Purpose.GRADIENTS
            case "broadcast" if ranks == self._pipe:
                return Purpose.DEEPSPEED_LOSS
            case "all_reduce":
                return self._sum(self.axis(group, ranks), payload)
        return Purpose.OTHER

    def phase(self, purpose: Purpose) -> Phase:
        """Of what is being called now."""
        match purpose:
            case Purpose.STAGE_OUTPUTS:
                return "forward"
            case Purpose.STAGE_INPUTS:
                return "backward"
            case Purpose.GRADIENTS:
                # The last bucket is sent when autograd has returned.
                return "backward" if self._reduces_in_backward else "step"
        return current_phase()

    def _between_stages(self, operation: str, ranks: tuple[int, ...]) -> Purpose:
        """Later stages have higher ranks."""
        is_lower = self._rank == min(ranks)
        return Purpose.STAGE_OUTPUTS if is_lower == (operation == "send") else Purpose.STAGE_INPUTS

    def _sum(self, axis: str, payload: int) -> Purpose:
        """Of an all-reduce of DeepSpeed's."""
        if payload > _SCALAR:
            is_data = axis in ("data", "expert_data", "world")
            return Purpose.GRADIENTS if is_data else Purpose.TIED_EMBEDDING
        if len(self._pipe) > 1 and axis == "data" and payload > 1:
            return Purpose.DEEPSPEED_LOSS
        return Purpose.DEEPSPEED_CHECKS
