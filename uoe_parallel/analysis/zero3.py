"""Which weights ZeRO 3 gathers together, and how often, in a micro-batch's two passes."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from uoe_parallel.config.schema import Recompute
from uoe_parallel.model.block import DenseBlock, RoutedBlock
from uoe_parallel.model.heads import VocabularyHead
from uoe_parallel.model.language_model import LanguageModel, TransformerBlock
from uoe_parallel.parallel.purposes import Phase

_RECOMPUTED: dict[Recompute, type[nn.Module] | None] = {
    "none": None,
    "selective": RoutedBlock,
    "full": TransformerBlock,
}


@dataclass(frozen=True)
class Gathering:
    """Parameters that share one all-gather."""

    phase: Phase
    params: list[nn.Parameter]


@dataclass(frozen=True)
class Gatherings:
    """Of a micro-batch."""

    all: list[Gathering]
    most_forward: int
    """The most elements of weights that are here at a time because they were gathered, in a forward
    pass."""
    most_backward: int
    """In a backward pass."""


def gatherings(
    model: LanguageModel,
    zero: DeepSpeedZeroConfig,
    kept_whole: list[nn.Parameter],
    recompute: Recompute,
) -> Gatherings:
    """All of a micro-batch's forward and backward pass.

    Follows DeepSpeed's coordinator once it knows the order of modules. At a module's start it
    gathers what the module needs and misses, then, in order of use, what follows, up to the size
    of the prefetch bucket. At a module's end it lets go of its weights, unless they are used again
    within the reuse distance, or were here when it last looked ahead to a later use.

    What is gathered together arrives in one piece, of which each weight gets a copy; the piece is
    kept until the last of them is used.

    kept_whole: parameters that are not gathered for each use.
    """
    coordinator = _Coordinator(model, zero, kept_whole, _RECOMPUTED[recompute])
    found: list[Gathering] = []
    forward = backward = left = 0
    for gathering in coordinator.run():
        found.append(gathering)
        piece = sum(param.numel() for param in gathering.params)
        most = coordinator.gathered + (piece if len(gathering.params) > 1 else 0)
        if gathering.phase == "forward":
            forward, left = max(forward, most), coordinator.gathered
        else:
            backward = max(backward, most)
    return Gatherings(found, forward, max(backward, left))


@dataclass(frozen=True)
class _Event:
    """One end of a module's forward or backward pass."""

    phase: Phase
    is_start: bool
    module: nn.Module


class _Coordinator:
    def __init__(
        self,
        model: LanguageModel,
        zero: DeepSpeedZeroConfig,
        kept_whole: list[nn.Parameter],
        recomputed: type[nn.Module] | None,
    ) -> None:
        self.zero = zero
        self.kept_whole = set(kept_whole)
        self.number = {param: n for n, param in enumerate(model.parameters())}
        self.tied = model.embedding.tokens.weight if model.tied and model.embedding else None
        self.read: dict[nn.Module, list[nn.Parameter]] = {}
        self.events = [*_forward(model), *_backward(model, recomputed)]
        starts = [event.module for event in self.events if event.is_start]
        self.trace = [self._params(module) for module in starts]
        self.uses: dict[nn.Parameter, list[int]] = {param: [] for param in self.number}
        """Steps at which each parameter is used."""
        for step, params in enumerate(self.trace):
            for param in params:
                self.uses[param].append(step)
        sizes = (sum(param.numel() for param in params) for params in self.trace)
        self.used_before = list(accumulate(sizes, initial=0))
        """Elements that all steps before each one use."""
        self.step = 0
        """Modules started so far."""
        self.queue = deque((p, step) for step, params in enumerate(self.trace) for p in params)
        """Uses that have not been looked at, each with its step."""
        self.seen_use = dict.fromkeys(self.number, -1)
        """Step of the last use of each parameter that was looked at."""
        self.here = set(self.kept_whole)
        self.gathered = 0
        """Elements of weights that were gathered and are here."""
        self.users: dict[nn.Parameter, set[nn.Module]] = {param: set() for param in self.number}

    def run(self) -> Iterator[Gathering]:
        for event in self.events:
            if not event.is_start:
                self._let_go(event.module)
                continue
            needed = self._params(event.module)
            for param in needed:
                self.users[param].add(event.module)
            if missing := [param for param in needed if param not in self.here]:
                yield self._gather(event.phase, missing)
            if following := self._look_ahead(needed):
                yield self._gather(event.phase, following)
            self.step += 1

    def _params(self, module: nn.Module) -> list[nn.Parameter]:
        """What a module's own code reads, in the model's order."""
        if module not in self.read:
            self.read[module] = self._read(module)
        return self.read[module]

    def _read(self, module: nn.Module) -> list[nn.Parameter]:
        params = set(module.parameters(recurse=False))
        others = []
        if isinstance(module, DenseBlock):
            others.append(module.experts.output_bias)
        if isinstance(module, VocabularyHead):
            others.append(self.tied)
        # DeepSpeed learns of parameters of other modules by finding them gone.
        params.update(p for p in others if p is not None and p not in self.kept_whole)
        return sorted(params, key=self.number.__getitem__)

    def _gather(self, phase: Phase, params: list[nn.Parameter]) -> Gathering:
        self.here.update(params)
        self.gathered += sum(param.numel() for param in params)
        return Gathering(phase, params)

    def _look_ahead(self, needed: list[nn.Parameter]) -> list[nn.Parameter]:
        """What to gather before its module starts."""
        unseen = sum(self.seen_use[param] < self.step for param in needed)
        for param, step in [self.queue.popleft() for _ in range(unseen)]:
            self.seen_use[param] = step
        limit = min(self.zero.max_live_parameters - self.gathered, self.zero.prefetch_bucket_size)
        wanted: list[nn.Parameter] = []
        size = 0
        while self.queue and size < limit:
            param, step = self.queue.popleft()
            self.seen_use[param] = max(self.seen_use[param], step)
            if param not in self.here and all(param is not other for other in wanted):
                wanted.append(param)
                size += param.numel()
        return wanted

    def _let_go(self, module: nn.Module) -> None:
        for param in self._params(module):
            self.users[param].discard(module)
            stays = self._used_soon(param) or self.seen_use[param] > self.step
            leaves = param in self.here and param not in self.kept_whole
            if leaves and not stays and not self.users[param]:
                self.here.remove(param)
                self.gathered -= param.numel()

    def _used_soon(self, param: nn.Parameter) -> bool:
        """Whether a step uses it with less than the reuse distance before that."""
        uses = self.uses[param]
        following = bisect_left(uses, self.step)
        if following == len(uses):
            return False
        distance = self.used_before[uses[following]] - self.used_before[self.step]
        return distance < self.zero.max_reuse_distance


def _forward(module: nn.Module, phase: Phase = "forward") -> Iterator[_Event]:
    """Modules are called in the order in which they were made, but for lists of them, which are
    not called, and a layer's dropout, which is called after each block."""
    if isinstance(module, nn.ModuleDict):
        yield from chain.from_iterable(_forward(child, phase) for child in module.children())
        return
    yield _Event(phase, True, module)
    for child in _called_by(module):
        yield from _forward(child, phase)
    yield _Event(phase, False, module)


def _backward(module: nn.Module, recomputed: type[nn.Module] | None) -> Iterator[_Event]:
    """recomputed: modules that come forward once more."""
    if isinstance(module, nn.ModuleDict):
        for child in reversed(list(module.children())):
            yield from _backward(child, recomputed)
        return
    yield _Event("backward", True, module)
    children = _called_by(module)
    if recomputed is not None and isinstance(module, recomputed):
        yield from chain.from_iterable(_forward(child, "recompute") for child in children)
    for child in reversed(children):
        yield from _backward(child, recomputed)
    yield _Event("backward", False, module)


def _called_by(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, TransformerBlock):
        dropout = module.dropout
        return [
            *(module.attention_norm, module.attention, dropout),
            *(module.feed_forward_norm, module.feed_forward, dropout),
        ]
    return list(module.children())
