"""Planted faults: they show that a verification catches what it claims to.

A seed picks the parameter or the reduction out of those that a layout has. Nothing here touches a
run that was not asked for a fault, and a process that has one planted keeps it to its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.agreement import broadcast_json, gather_json
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.parallel.sharding import partition_dim, replica_group
from uoe_parallel.verification.request import FaultKind, FaultRequest, PlantedFault

SCALE = 1.01
_EMBEDDING = "embedding.tokens.weight"


@dataclass(frozen=True)
class _Way:
    """One way to spoil a gradient. Names are those of parameters, or of routed blocks."""

    what: str
    sites: Callable[[LanguageModel, ParallelGroups], Iterable[str]]
    """Names that a rank could spoil; another rank may have others."""
    spoil: Callable[[str, LanguageModel, ParallelGroups], None]
    """Called on every rank, also where the name is not."""
    parameter: str = "{name}"


def plant(
    request: FaultRequest, model: LanguageModel, groups: ParallelGroups
) -> PlantedFault | None:
    """Make gradients of `model` wrong from here on; None if the layout has nothing to spoil.

    Collective over all ranks, which all plant the same fault.
    """
    ways = _WAYS[request.kind]
    own = [[number, name] for number, way in enumerate(ways) for name in way.sites(model, groups)]
    gathered = gather_json(own, groups.world)
    sites = sorted({(number, name) for part in gathered for number, name in part})
    choice = None
    if sites:
        drawn = random.Random(request.seed)
        number = drawn.choice(sorted({number for number, _ in sites}))
        choice = [number, drawn.choice([name for n, name in sites if n == number])]
    choice = broadcast_json(choice, groups.world)  # only rank 0 has seen all sites
    if choice is None:
        return None
    number, name = choice
    ways[number].spoil(name, model, groups)
    return PlantedFault(
        ways[number].what.format(name=name), ways[number].parameter.format(name=name)
    )


def _parameters(model: LanguageModel, groups: ParallelGroups) -> Iterable[str]:
    return (name for name, _ in model.named_parameters())


def _averaged(model: LanguageModel, groups: ParallelGroups) -> Iterable[str]:
    """What several data ranks hold."""
    named = model.named_parameters()
    return (name for name, param in named if replica_group(param, groups).size() > 1)


def _summed(model: LanguageModel, groups: ParallelGroups) -> Iterable[str]:
    """What tensor ranks hold whole and use on other tokens each."""
    if not groups.layout.sequence_parallel:
        return ()
    return (name for name, param in model.named_parameters() if partition_dim(param) is None)


def _entered(model: LanguageModel, groups: ParallelGroups) -> Iterable[str]:
    """Routed blocks whose ranks compute other experts for the same tokens."""
    layout = groups.layout
    return model.routed_blocks() if layout.tensor > 1 and not layout.sequence_parallel else ()


def _tied(model: LanguageModel, groups: ParallelGroups) -> Iterable[str]:
    """The embedding, where two stages use it."""
    return (_EMBEDDING,) if model.tied and groups.layout.pipeline > 1 else ()


def _scale(name: str, model: LanguageModel, groups: ParallelGroups, factor: float = SCALE) -> None:
    # Hooks of a leaf come before those by which DeepSpeed takes the gradient away.
    for param in (param for n, param in model.named_parameters() if n == name):
        param.register_hook(lambda gradient: gradient * factor)


def _average_nothing(name: str, model: LanguageModel, groups: ParallelGroups) -> None:
    # The mean then is the first rank's gradient, wherever DeepSpeed takes it.
    for param in (param for n, param in model.named_parameters() if n == name):
        replicas = replica_group(param, groups)
        _scale(name, model, groups, float(replicas.size()) if replicas.rank() == 0 else 0.0)


def _keep_first_stage(name: str, model: LanguageModel, groups: ParallelGroups) -> None:
    if not groups.is_first_stage:
        _scale(name, model, groups, 0.0)


def _skip_sum(name: str, model: LanguageModel, groups: ParallelGroups) -> None:
    parameters = dict(model.named_parameters())
    real = comm.sum_gradient

    def sum_gradient(x: Tensor, group: comm.ProcessGroup, purpose: Purpose) -> Tensor:
        # A parameter, or what a change of its dtype made of it.
        cast_from = x.grad_fn.next_functions[0][0] if x.grad_fn is not None else None
        source = getattr(cast_from, "variable", x)
        return x if source is parameters.get(name) else real(x, group, purpose)

    comm.sum_gradient = sum_gradient


def _skip_entry(name: str, model: LanguageModel, groups: ParallelGroups) -> None:
    real, entering = comm.sum_gradient, [False]

    def sum_gradient(x: Tensor, group: comm.ProcessGroup, purpose: Purpose) -> Tensor:
        if entering[0]:
            entering[0] = False  # the gates, which come second, are summed
            return x
        return real(x, group, purpose)

    def enter(*_: object) -> None:
        entering[0] = True

    if name in model.routed_blocks():
        model.routed_blocks()[name].register_forward_pre_hook(enter)
        comm.sum_gradient = sum_gradient


_WAYS: dict[FaultKind, list[_Way]] = {
    "scale-gradient": [
        _Way(f"the gradient of {{name}} is multiplied by {SCALE}", _parameters, _scale),
    ],
    "skip-reduction": [
        _Way("the gradient of {name} is not averaged over data ranks", _averaged, _average_nothing),
        _Way("the gradient of {name} is not summed over tensor ranks", _summed, _skip_sum),
        _Way(
            "the gradient of what enters {name} is not summed over tensor ranks",
            _entered,
            _skip_entry,
            "{name}_norm.weight",
        ),
        _Way("the gradient of {name} is not summed over stages", _tied, _keep_first_stage),
    ],
}
