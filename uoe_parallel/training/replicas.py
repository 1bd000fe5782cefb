"""Whether ranks still hold alike what they should: checksums, compared.

A bit that flips in a device's memory, or a kernel that computes wrongly on one of them, stops
nothing: the copies of a weight part for good, and every loss after that is of no model at all
(silent data corruption: Hochschild et al., "Cores that don't count", HotOS 2021; Llama 3, arXiv
2407.21783, section 3.3.4).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.model.running_rules import rule_states
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.agreement import broadcast_json, gather_json
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.parallel.random import shared_stream
from uoe_parallel.parallel.sharding import is_wide, partition_dim
from uoe_parallel.training.engine import TrainingEngine
from uoe_parallel.training.progress import Progress
from uoe_parallel.training.state import replicated_states

Axis = Literal["world", "data", "expert_data", "tensor", "pipe"]
"""A group over which something is alike."""

_CHUNK = 1 << 20
"""Elements that are mixed at a time: 8 MiB each for three temporary tensors."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOTHING = torch.iinfo(torch.int64).min
"""Is never the largest, as a checksum or as its complement."""


@dataclass(frozen=True)
class Mismatch:
    """What ranks hold differently though it should be alike."""

    name: str
    """The first of these, in the order of the model."""
    ranks: list[int]
    """That differ from most of those that hold the same, or from the first without a majority."""

    def __str__(self) -> str:
        plural = "s" if len(self.ranks) > 1 else ""
        return f"{self.name} differs on rank{plural} {', '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class _Held:
    """Something that other ranks hold as well."""

    name: str
    tensor: Tensor
    axes: tuple[Axis, ...]


class Replicas:
    """What of a run is the same on several ranks. Built and used by every rank alike."""

    def __init__(self, engine: TrainingEngine, groups: ParallelGroups) -> None:
        self._engine = engine
        self._model = engine.model
        self._groups = groups
        self._device = engine.device
        self._axes: dict[Axis, ProcessGroup] = {
            "world": groups.world,
            "data": groups.data,
            "expert_data": groups.expert_data,
            "tensor": groups.tensor,
            "pipe": groups.pipe,
        }

    def mismatch(self, progress: Progress) -> Mismatch | None:
        """What differs, the same answer on every rank. Collective over all ranks.

        Sends 16 bytes for each tensor over each of its groups, and more only if something differs.
        """
        held = list(self._held(progress))
        sums_H = torch.stack([checksum(item.tensor).to(self._device) for item in held])
        differs_H = torch.zeros_like(sums_H, dtype=torch.bool)
        for axis in self._axes:
            differs_H |= self._differs(axis, held, sums_H)
        anywhere = comm.max_over(
            differs_H.any().int(), self._groups.world, purpose=Purpose.REPLICAS
        )
        return self._named(held, sums_H, differs_H) if anywhere else None

    def _differs(self, axis: Axis, held: Sequence[_Held], sums_H: Tensor) -> Tensor:
        """Which of the checksums are not the same over the group of `axis`."""
        alike_H = torch.tensor([axis in item.axes for item in held], device=self._device)
        if axis == "pipe" and self._ties_stages:
            # Stages between the first and the last have nothing to say, in as many words.
            own = torch.full((self._num_kinds,), _NOTHING, device=self._device)
            words = torch.cat((own, own))
            if alike_H.any():
                words = torch.cat((sums_H[alike_H], ~sums_H[alike_H]))
        else:
            words = torch.cat((sums_H[alike_H], ~sums_H[alike_H]))
        if words.numel() == 0:
            return alike_H
        words = comm.max_over(words, self._axes[axis], purpose=Purpose.REPLICAS)
        largest, smallest = words.chunk(2)
        differs_H = torch.zeros_like(alike_H)
        if alike_H.any():
            differs_H[alike_H] = largest != ~smallest
        return differs_H

    def _named(self, held: Sequence[_Held], sums_H: Tensor, differs_H: Tensor) -> Mismatch:
        """The first of what differs, and where."""
        world, own = self._groups.world, differs_H.nonzero().flatten().tolist()
        first = [self._groups.stage, own[0], held[own[0]].name] if own else None
        firsts = [entry for entry in gather_json(first, world) if entry is not None]
        name = broadcast_json(min(firsts)[2] if firsts else None, world)
        # Who holds the same is told apart by the place on all other axes.
        mine = [
            [self._place(item), int(sums_H[number])]
            for number, item in enumerate(held)
            if item.name == name
        ]
        reports = gather_json(mine, world)
        return Mismatch(name, broadcast_json(_differing(reports), world))

    def _held(self, progress: Progress) -> Iterator[_Held]:
        """All that is compared. What the rest follows from comes first."""
        engine = self._engine
        counts = torch.tensor([progress.step, progress.batch, progress.updates])
        yield _Held("the position in the data", counts, ("world",))
        main = engine.config.training.learning_rate
        rates = [g["lr"] for g in engine.deepspeed.optimizer.param_groups if g["peak_lr"] == main]
        rate = torch.tensor(rates[:1], dtype=torch.float64)
        yield _Held("the learning rate", rate, ("world",))
        yield _Held("the history of losses", engine.guard.as_tensor(), ("world",))
        yield _Held("the random stream of the tensor group", shared_stream(), ("tensor",))
        states = replicated_states(engine.deepspeed)
        for name, param in self._model.named_parameters():
            axes = self._axes_of(param)
            if not axes:
                continue
            weight = getattr(param, "ds_tensor", param).detach()
            yield _Held(f"{name}/weight", weight, axes)
            for kind, state in states.get(param, {}).items():
                yield _Held(f"{name}/{kind}", state, axes)
        for name, state in rule_states(self._model.routed_blocks()):
            yield _Held(name, state, ("data", "tensor"))

    def _axes_of(self, param: nn.Parameter) -> tuple[Axis, ...]:
        axes: list[Axis] = []
        if not hasattr(param, "ds_tensor"):  # which ZeRO 3 cuts over replicas
            axes.append("expert_data" if is_wide(param) else "data")
        if partition_dim(param) is None and not is_wide(param):
            axes.append("tensor")
        if self._ties_stages and param is self._tied_weight:
            axes.append("pipe")
        return tuple(axes)

    @property
    def _ties_stages(self) -> bool:
        return self._model.tied and self._groups.pipe.size() > 1

    @property
    def _tied_weight(self) -> nn.Parameter | None:
        embedding = self._model.embedding
        return None if embedding is None else embedding.tokens.weight

    @property
    def _num_kinds(self) -> int:
        """Tensors of a tied weight that are compared, the same number on every stage."""
        if self._engine.config.training.trains == "routers":
            return 1
        states = replicated_states(self._engine.deepspeed)
        return 1 + max((len(kinds) for kinds in states.values()), default=0)

    def _place(self, item: _Held) -> list[int]:
        """The same on all ranks that hold `item` alike."""
        if "world" in item.axes:
            return []
        groups, stage = self._groups, -1 if "pipe" in item.axes else self._groups.stage
        if "expert_data" in item.axes:
            return [stage, groups.expert.rank()]
        data = -1 if "data" in item.axes else groups.data_rank
        return [stage, data, -1 if "tensor" in item.axes else groups.tensor_rank]


def _differing(reports: Sequence[Sequence[tuple[list[int], int]]]) -> list[int]:
    """Of each rank's places and checksums of one name: the ranks that hold it differently."""
    holders: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
    for rank, report in enumerate(reports):
        for place, value in report:
            holders[tuple(place)][rank] = value
    ranks: list[int] = []
    for values in holders.values():
        (common, count), *_ = Counter(values.values()).most_common(1)
        expected = common if 2 * count > len(values) else next(iter(values.values()))
        ranks += [rank for rank, value in values.items() if value != expected]
    return sorted(ranks)


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """A hash of the bits of `x` and their order, int64 [], on its device.

    The sum modulo 2^64 of each element's bits mixed with its position, in the manner of SplitMix64
    (Steele, Lea, Flood, OOPSLA 2014). The mixing is one-to-one: one element that differs always
    shows.
    """
    bits = x.detach().contiguous().view(-1)
    bits = bits.view(_BITS[bits.element_size()])
    places = torch.arange(min(_CHUNK, bits.numel()), device=x.device).mul_(_signed(_GOLDEN))
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for chunk in bits.split(_CHUNK):
        mixed = places[: chunk.numel()] + chunk
        for factor in _FACTORS:
            mixed ^= (mixed >> 32).bitwise_and_(0xFFFFFFFF)
            mixed *= _signed(factor)
        mixed ^= (mixed >> 32).bitwise_and_(0xFFFFFFFF)
        total += mixed.sum()
        places += _signed(_GOLDEN * _CHUNK)
    return total


_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
