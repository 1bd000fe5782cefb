"""What DeepSpeed sends for gradients and weights, by its own rules of each ZeRO stage.

Followed are `communication_data_type` and the options of `zero_optimization` that size buckets and,
under ZeRO 3, say which weights are kept; others are taken at their defaults. Which gradients of
ZeRO 2 and 3 share a bucket depends on the order in which the backward pass finishes them, taken
here as the reverse of the model's: should it differ, numbers of calls would, and no bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
from torch import nn

from uoe_parallel.analysis.states import StateRules, spans
from uoe_parallel.analysis.transfer import Transfer, times
from uoe_parallel.parallel.purposes import Phase, Purpose
from uoe_parallel.parallel.sharding import is_wide


def gradient_traffic(rules: StateRules, micro_batches: int) -> Iterator[Transfer]:
    """From the gradients of this rank's stage to the weights of the next step."""
    traffic = _Traffic(rules)
    yield from traffic.tied_embedding()
    if rules.stage == 3:
        yield from times(traffic.zero3_pass(), micro_batches)
        yield from traffic.zero3_step()
        return
    reduced = list(traffic.reduced_gradients())
    yield from times(reduced, micro_batches if rules.stage == 2 else 1)
    yield from traffic.checks()
    yield from traffic.gathered_weights()


class _Traffic:
    """That follows from the rules."""

    def __init__(self, rules: StateRules) -> None:
        self.rules = rules

    def tied_embedding(self) -> Iterator[Transfer]:
        model = self.rules.model
        if not model.tied or model.embedding is None or self.rules.groups.pipe.size() == 1:
            return
        if not model.embedding.tokens.weight.requires_grad:
            return
        element = 4 if self.rules.is_flat_bf16 and self.rules.stage == 1 else self.rules.element
        payload = model.embedding.tokens.weight.numel() * element
        purpose = Purpose.TIED_EMBEDDING
        yield Transfer(purpose, "step", "tied_stages", "all_reduce", 1, payload)

    def reduced_gradients(self) -> Iterator[Transfer]:
        """One reduction of all gradients without ZeRO and with its first two stages."""
        for wide in (False, True):
            if self.rules.is_flat_bf16:
                groups = [g for g in self.rules.parameter_groups if is_wide(g[0]) == wide]
                sizes = closed_at(
                    map(self.rules.padded_size, groups), MEMORY_OPT_ALLREDUCE_SIZE + 1
                )
            elif self.rules.stage == 0:
                params = [p for p in self.rules.trained if is_wide(p) == wide]
                sizes = closed_at((p.numel() for p in params), MEMORY_OPT_ALLREDUCE_SIZE + 1)
            else:
                sizes = self._bucketed(wide)
            yield from self._summed(sizes, wide)

    def _summed(self, sizes: Iterable[int], wide: bool) -> Iterator[Transfer]:
        phase: Phase = "backward" if self.rules.stage == 2 else "step"
        group = "expert_data" if wide else "data"
        for size in sizes:
            payload = size * self.rules.reduced_element
            yield Transfer(Purpose.GRADIENTS, phase, group, "all_reduce", 1, payload)

    def _bucketed(self, wide: bool) -> Iterator[int]:
        """Elements of the all-reduces of ZeRO 1 and 2: of each bucket, in each kind of group."""
        params = [param for group in self.rules.parameter_groups for param in group]
        if self.rules.stage == 2:
            params = self.rules.trained[::-1]
        limit = self.rules.zero.reduce_bucket_size
        for bucket in filled_up_to(params, limit):
            sizes = [param.numel() for param in bucket if is_wide(param) == wide]
            if sizes and sizes[0] > limit:  # then it is alone
                sizes = self._parts(bucket[0])
            yield from closed_at(sizes, limit + 1)

    def _parts(self, param: nn.Parameter) -> list[int]:
        """A parameter's elements in each part of its group."""
        (group,) = (g for g in self.rules.parameter_groups if any(p is param for p in g))
        each = self.rules.part_size(group)
        (start, stop), *_ = (span for p, span in spans(group) if p is param)
        cuts = [start, *range((start // each + 1) * each, stop, each), stop]
        return [b - a for a, b in pairwise(cuts)]

    def gathered_weights(self) -> Iterator[Transfer]:
        """Weights that each rank stepped its part of."""
        if self.rules.stage == 0 and not self.rules.is_flat_bf16:
            return
        for params in self.rules.parameter_groups:
            group = "expert_data" if is_wide(params[0]) else "data"
            payload = self.rules.part_size(params) * self.rules.element
            yield Transfer(Purpose.WEIGHTS, "step", group, "all_gather", 1, payload)

    def checks(self) -> Iterator[Transfer]:
        """DeepSpeed's own look at bf16 gradients: are they finite, and in part their norm."""

        def reduce(group: str, size: int) -> Transfer:
            return Transfer(Purpose.DEEPSPEED_CHECKS, "step", group, "all_reduce", 1, size)

        if not self.rules.is_bf16:
            return
        wide = any(is_wide(params[0]) for params in self.rules.parameter_groups)
        if self.rules.is_flat_bf16:
            yield reduce("model" if self.rules.groups.pipe.size() > 1 else "tensor", 4)
            if wide:
                yield reduce("pipe", 4)
                yield reduce("expert", 4)
        elif self.rules.stage == 0:
            if wide:
                yield reduce("expert", 1)
            yield reduce("tensor", 1)
            for params in self.rules.parameter_groups:
                if not is_wide(params[0]):
                    yield reduce("tensor", 4)
        else:
            yield reduce("data", 1)
            yield reduce("tensor", 1)

    def zero3_pass(self) -> Iterator[Transfer]:
        """One micro-batch under ZeRO 3: weights gathered for their modules, gradients scattered."""
        for gathering in self.rules.gatherings.all:
            payload = sum(map(self.rules.partition_size, gathering.params)) * self.rules.element
            yield Transfer(Purpose.WEIGHTS, gathering.phase, "data", "all_gather", 1, payload)
        params = self.rules.trained[::-1]
        for bucket in filled_up_to(params, self.rules.zero.reduce_bucket_size):
            size = sum(self.rules.partition_size(p) * self.rules.replicas(p) for p in bucket)
            payload = size * self.rules.reduced_element
            yield Transfer(Purpose.GRADIENTS, "backward", "data", "reduce_scatter", 1, payload)

    def zero3_step(self) -> Iterator[Transfer]:
        """The end of a step under ZeRO 3: weights kept whole."""
        for param in self.rules.kept_whole():
            payload = self.rules.partition_size(param) * self.rules.element
            yield Transfer(Purpose.KEPT_WEIGHTS, "step", "data", "all_gather", 1, payload)


def closed_at(sizes: Iterable[int], least: int) -> Iterator[int]:
    """Sums of runs of `sizes`, each ended by what brings it to `least` or more."""
    total = 0
    for size in sizes:
        total += size
        if total >= least:
            yield total
            total = 0
    if total:
        yield total


def filled_up_to(params: Iterable[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of at most `most` elements, or of one parameter of more."""
    bucket: list[nn.Parameter] = []
    total = 0
    for param in params:
        if bucket and total + param.numel() > most:
            yield bucket
            bucket, total = [], 0
        bucket.append(param)
        total += param.numel()
    if bucket:
        yield bucket
