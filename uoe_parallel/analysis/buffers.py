"""What DeepSpeed holds beside the model's states, at the moments of a step.

By its own rules of each ZeRO stage, followed as in `reduction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile

import numpy as np
from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE

from uoe_parallel.analysis.parts import Numbers, Points, elements
from uoe_parallel.analysis.reduction import closed_at
from uoe_parallel.analysis.states import StateRules
from uoe_parallel.parallel.sharding import is_wide

_NORM = 8  # bytes of an fp64


@dataclass(frozen=True)
class Held:
    """Bytes of gradients, however far they have come, and of buffers."""

    gradients: int
    buffers: int


class StepBuffers:
    """Of a step."""

    def __init__(self, rules: StateRules, *, is_accumulated: bool) -> None:
        """is_accumulated: whether a backward pass finds gradients of another one."""
        self.rules = rules
        self.is_accumulated = is_accumulated
        self.size = elements(self.rules.trained)
        self.largest = max(param.numel() for param in self.rules.trained)
        self.own = {
            param for group in self.rules.parameter_groups for param in self.rules.touched(group)
        }
        """Parameters of which ZeRO 1 and 2 have something step here."""
        self.bucket = self._bucket()

    def _bucket(self) -> int:
        """Bytes of what gradients are put together in, contiguous, before they are reduced."""
        if (
            self.rules.stage == 0
            or self.rules.is_flat_bf16
            or not self.rules.zero.contiguous_gradients
        ):
            return 0
        number = 2 if self.rules.zero.overlap_comm and self.rules.stage != 3 else 1
        return number * int(self.rules.zero.reduce_bucket_size) * self.rules.element

    def forward(self) -> Held:
        """While a forward pass goes on."""
        if self.rules.stage == 3:
            gathered = self.rules.gatherings
            return Held(
                self.rules.states.gradients,
                self.bucket + self.rules.element * gathered.most_forward,
            )
        return Held(self._before(), 0)

    def backward(self, points: Points) -> tuple[Numbers, Numbers]:
        """Gradients and buffers, as in `Held`, at each point of a pass."""
        new, here = points.making, points.made
        if self.rules.is_flat_bf16:
            return self._before() + self.rules.element * (here + new), 4 * new
        # A last gradient that is too large for the bucket is reduced when the next one comes.
        most = self.rules.zero.reduce_bucket_size
        of_new = self.rules.element * (new + np.where(points.last > most, points.last, 0))
        is_full = (here + new > most) & (new > 0)
        buffers = self.bucket + np.where(is_full, self._sent, 0)
        if self.rules.stage == 3:
            gathered = self.rules.element * self.rules.gatherings.most_backward
            return self.rules.states.gradients + of_new, buffers + gathered
        if self.rules.stage == 2:
            has_own = here > self._behind_own
            return np.where(has_own, self._reduced(), self._before()) + of_new, buffers
        sums = self.size if self.is_accumulated else here
        return self.rules.element * (sums + new), np.where(here > 0, self.bucket, 0)

    def optimizer(self) -> Iterator[Held]:
        """From the last backward pass to the next step."""
        if self.rules.is_flat_bf16:
            sizes = map(self.rules.padded_size, self.rules.parameter_groups)
            yield Held(self.rules.states.gradients, 4 * _most_copied(sizes))
            yield Held(self.rules.states.gradients, _NORM * self.largest)
        elif self.rules.stage == 0:
            yield from self._plain()
        elif self.rules.stage == 3:
            part = max(
                max(
                    closed_at(map(self.rules.partition_size, group), self.rules.zero.sub_group_size)
                )
                for group in self.rules.parameter_groups
            )
            largest = max(map(self.rules.partition_size, self.rules.trained))
            yield Held(self.rules.states.gradients, self.bucket + self._sent)
            yield Held(self.rules.states.gradients, self.bucket + max(4 * part, _NORM * largest))
        elif self.rules.stage == 2:
            yield Held(self._reduced(), self.bucket + self._sent)
            yield from self._partitioned()
        else:
            yield self._all_reduced()
            yield from self._partitioned()

    def _before(self) -> int:
        """Of gradients, as a pass finds them."""
        if self.rules.is_flat_bf16:
            return self.rules.states.gradients - self.rules.element * self.size
        return self.rules.states.gradients if self.is_accumulated else 0

    @cached_property
    def _own(self) -> int:
        """Elements of which ZeRO 2 keeps the gradients."""
        return sum(param.numel() for param in self.own)

    @cached_property
    def _behind_own(self) -> int:
        """Elements of the parameters behind the last own one."""
        return elements(
            list(takewhile(lambda param: param not in self.own, self.rules.trained[::-1]))
        )

    def _plain(self) -> Iterator[Held]:
        """Without ZeRO: gradients are reduced as one flat copy, in a type of its own."""
        kinds = [
            [p.numel() for p in self.rules.trained if is_wide(p) == wide] for wide in (False, True)
        ]
        copied = self.rules.element * max(map(_most_copied, kinds))
        if self.rules.reduced_element != self.rules.element:
            runs = chain.from_iterable(closed_at(sizes, _AT_ONCE) for sizes in kinds)
            copied += self.rules.reduced_element * max(runs)
        yield Held(self.rules.states.gradients, copied)
        masters = 4 * self.size if self.rules.is_bf16 else 0  # after the norm
        yield Held(self.rules.states.gradients, max(masters, _NORM * self.largest))

    def _partitioned(self) -> Iterator[Held]:
        """ZeRO 1 and 2: own gradients are flattened group by group."""
        part = max(map(self.rules.part_size, self.rules.parameter_groups))
        own = self.rules.states.gradients if self.rules.is_bf16 else self.rules.element * self._own
        yield Held(own, 0 if self.rules.is_bf16 else 4 * part)
        yield Held(own, _NORM * self.largest)

    def _all_reduced(self) -> Held:
        """ZeRO 1 after the last backward pass: gradients move to the bucket, own ones to a copy."""
        in_bucket = min(self.size, int(self.rules.zero.reduce_bucket_size))
        rest = self.size - in_bucket
        own = self._own if rest else 0
        gradients = self.rules.element * (rest + own)
        return Held(gradients, self.bucket + max(self._sent, self.rules.element * in_bucket))

    def _reduced(self) -> int:
        """Bytes of gradients under ZeRO 2 once a pass has some of this rank's own: those of bf16
        are added to where they stay, others come beside the sums of the passes before."""
        if self.rules.is_bf16:
            return self.rules.states.gradients
        return self._before() + self.rules.element * self._own

    @cached_property
    def _sent(self) -> int:
        """Bytes of the copy of a bucket that is reduced, in the type of its own that it may have:
        parts for one rank after the other, where there are several ranks."""
        if max(map(self.rules.replicas, self.rules.trained)) == 1:
            return 0
        cast = self.rules.reduced_element if self.rules.reduced_element != self.rules.element else 0
        copies = 2 * cast if cast and self.rules.stage == 3 else cast + self.rules.element
        return copies * min(self.size, int(self.rules.zero.reduce_bucket_size))


_AT_ONCE = MEMORY_OPT_ALLREDUCE_SIZE + 1
"""Elements from which on the engine reduces what it has put together."""


def _most_copied(sizes: Iterable[int]) -> int:
    """Elements of the largest flat copy of gradients of these sizes, put together as `closed_at`
    does: one that stays alone is not copied."""
    most = total = number = 0
    for size in sizes:
        total, number = total + size, number + 1
        most = max(most, total if number > 1 else 0)
        if total >= _AT_ONCE:
            total = number = 0
    return most
