"""Rules between the fields of routing, for each kind of block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from uoe_parallel.config.faults import Fault, show
from uoe_parallel.config.rules import BALANCE_RULES, GATES, SELECTIONS, is_path, load_rule
from uoe_parallel.config.schema import RoutingConfig, RunConfig

_KV_FIELDS = ("model.num_kv_heads", "model.num_heads")


def is_routed(routing: RoutingConfig) -> bool:
    """Whether any layer has a routed block of this kind."""
    return routing.routed_layers not in ("none", [])


def kv_fields(config: RunConfig) -> tuple[str, str]:
    """The fields that give the number of key/value heads, the one that decides first."""
    explicit, implied = _KV_FIELDS
    return (implied, explicit) if config.model.num_kv_heads is None else (explicit, implied)


@dataclass(frozen=True)
class _Kind:
    """A kind of block that some layers route."""

    name: str
    routing: RoutingConfig
    num_experts: int
    expert_fields: tuple[str, ...]
    """What gives their number, the field that decides first."""
    config: RunConfig

    @property
    def routed_experts(self) -> int:
        return self.num_experts - self.routing.shared_experts

    def fault(self, fields: str, value: object, problem: str, mend: str, *others: str) -> Fault:
        """About `fields` of this section, separated by blanks, the one to mend first; `others` are
        of other sections."""
        own = tuple(f"{self.name}.{field}" for field in (*fields.split(), "routed_layers"))
        return Fault((*own, *others), value, problem, mend)


def _kinds(config: RunConfig) -> Iterator[_Kind]:
    """The kinds of blocks that are routed."""
    experts, heads = config.feed_forward.num_experts, config.model.kv_heads
    named = [
        ("feed_forward", config.feed_forward, experts, ("feed_forward.num_experts",)),
        ("attention", config.attention, heads, kv_fields(config)),
    ]
    for name, routing, count, fields in named:
        if is_routed(routing):
            yield _Kind(name, routing, count, fields, config)


KindRule = Callable[[_Kind], Iterable[Fault]]


def shared_experts_leave_some(kind: _Kind) -> Iterator[Fault]:
    shared = kind.routing.shared_experts
    if shared >= kind.num_experts:
        problem = f"leaves none of {kind.expert_fields[0]} = {kind.num_experts} to be routed"
        mend = f"use at most {kind.num_experts - 1}"
        yield kind.fault("shared_experts", shared, problem, mend, *kind.expert_fields)


def choices_fit_experts(kind: _Kind) -> Iterator[Fault]:
    """Each choice is of at most what there is to choose from."""
    routing, available = kind.routing, kind.routed_experts
    if available < 1:
        return
    there = f"the number of experts, {kind.expert_fields[0]} = {kind.num_experts}"
    if routing.shared_experts:
        there = f"the {available} experts that are not shared"
    kept = routing.segment_experts
    if kept is not None and kept > available:
        problem, mend = f"is more than {there}", f"use at most {available}"
        yield kind.fault("segment_experts shared_experts", kept, problem, mend, *kind.expert_fields)
    elif kept is not None:
        available = kept
        there = f"{kind.name}.segment_experts = {kept}, those that a segment keeps"
    if routing.selection is not None and routing.top_k > available:
        fields = "top_k segment_experts shared_experts selection"
        problem, mend = f"is more than {there}", f"use at most {available}"
        yield kind.fault(fields, routing.top_k, problem, mend, *kind.expert_fields)


def segments_are_whole(kind: _Kind) -> Iterator[Fault]:
    """Expert selection has both of its fields, and segments of whole patches."""
    routing, context = kind.routing, kind.config.model.sequence_length
    length, kept, patch = routing.segment_length, routing.segment_experts, routing.patch_length
    if (length is None) != (kept is None):
        given, missing = "segment_length", "segment_experts"
        if length is None:
            given, missing = missing, given
        problem = f"is given without {kind.name}.{missing}"
        value, mend = length or kept, f"give {kind.name}.{missing}, or remove it"
        yield kind.fault(f"{given} {missing}", value, problem, mend)
    elif length is not None and length % patch:
        problem = f"is not a multiple of {kind.name}.patch_length = {patch}"
        mend = f"use {(length // patch + 1) * patch}"
        yield kind.fault("segment_length segment_experts patch_length", length, problem, mend)
    elif length is not None and kind.config.model.causal and length >= context:
        problem = (
            f"makes one segment of a context of model.sequence_length = {context}, and in a causal "
            "model the first segment keeps all experts"
        )
        mend = f"use at most {context - 1}"
        others = ("model.sequence_length", "model.task")
        yield kind.fault("segment_length segment_experts", length, problem, mend, *others)


def something_chooses(kind: _Kind) -> Iterator[Fault]:
    if kind.routing.selection is None and kind.routing.segment_experts is None:
        name = kind.name
        problem = f"leaves the choice to segments, and {name}.segment_experts is not given"
        mend = f'give {name}.segment_length and {name}.segment_experts, or use "top_k"'
        yield kind.fault("selection segment_experts", None, problem, mend)


_TABLES = {"selection": SELECTIONS, "gate": GATES, "balance": BALANCE_RULES}
_ATTRIBUTES = {
    "selection": ("per_unit", "looks_ahead", "balances"),
    "gate": (),
    "balance": ("scope", "loss", "offset"),
}
"""What a class has to say of itself, beside being called."""


def rules_are_known(kind: _Kind) -> Iterator[Fault]:
    routing = kind.routing
    balance = routing.balance or []
    named = {
        "selection": [] if routing.selection is None else [routing.selection],
        "gate": [routing.gate],
        "balance": balance,
    }
    for field, names in named.items():
        for name in names:
            if problem := _why_unknown(field, name):
                yield kind.fault(field, getattr(routing, field), problem, _known(field, name))
    twice = [name for name, count in Counter(balance).items() if count > 1]
    if twice:
        mend = f"use {show(list(dict.fromkeys(balance)))}"
        yield kind.fault("balance", routing.balance, f"names {show(twice[0])} twice", mend)


def _why_unknown(field: str, name: str) -> str | None:
    if not is_path(name):
        return None if name in _TABLES[field] else f"has no rule {show(name)}"
    try:
        rule = load_rule(_TABLES[field], name)
    except Exception as error:  # whatever a module of the user's does
        return f"names a class that can't be imported ({type(error).__name__}: {error})"
    missing = [attribute for attribute in _ATTRIBUTES[field] if not hasattr(rule, attribute)]
    return f"names a class without {', '.join(missing)}" if missing else None


def _known(field: str, name: str) -> str:
    if is_path(name):
        return 'write it as "module:Class", a class as docs/routing.md shows, where Python finds it'
    if near := get_close_matches(name, _TABLES[field], n=1):
        return f"did you mean {near[0]}?"
    return f'use one of {", ".join(_TABLES[field])}, or a class as "module:Class"'


def causal_models_look_back(kind: _Kind) -> Iterator[Fault]:
    """What a token computes may depend on nothing that comes later."""
    if kind.config.model.causal and _selection_is(kind, "looks_ahead"):
        problem = (
            "looks at later tokens to choose for earlier ones, which a causal model can't know "
            "when it predicts them"
        )
        mend = "use top_k or threshold, or another model.task than next_token"
        yield kind.fault("selection", kind.routing.selection, problem, mend, "model.task")


def _selection_is(kind: _Kind, property_name: str) -> bool:
    """Whether the class of a known selection says so of itself."""
    name = kind.routing.selection
    if name is None or _why_unknown("selection", name):
        return False
    return getattr(load_rule(SELECTIONS, name), property_name)


def gates_have_slope(kind: _Kind) -> Iterator[Fault]:
    """A softmax over one expert is 1 whatever its score: the router would learn nothing."""
    routing = kind.routing
    if routing.gate in ("softmax", "softmax_of_chosen") and kind.routed_experts == 1:
        problem = f"is 1 whatever the score of the one expert of {kind.name} that is routed"
        fields, mend = "gate shared_experts", "use sigmoid or relu, or route more experts"
        yield kind.fault(fields, routing.gate, problem, mend, *kind.expert_fields)
    if routing.gate != "softmax_of_chosen":
        return
    for field in ("top_k", "segment_experts"):
        chooses = field == "segment_experts" or routing.selection is not None
        if chooses and getattr(routing, field) == 1:
            problem = f"is 1 whatever the score where {kind.name}.{field} = 1, without a gradient"
            mend = f"use softmax, or {kind.name}.{field} = 2"
            yield kind.fault(f"gate {field} selection", routing.gate, problem, mend)


def capacity_limits_patches(kind: _Kind) -> Iterator[Fault]:
    routing = kind.routing
    if routing.capacity_factor is None:
        return
    if routing.selection is None:
        problem = "has nothing to limit: segments choose, and nothing of theirs is dropped"
    elif _selection_is(kind, "balances"):
        problem = f"is for rules that fill experts unevenly, and {routing.selection} balances them"
    else:
        return
    mend = "leave it out, or use top_k"
    yield kind.fault("capacity_factor selection", routing.capacity_factor, problem, mend)


def bias_has_an_effect(kind: _Kind) -> Iterator[Fault]:
    routing = kind.routing
    balance = routing.balance or []
    chooses_segments = routing.segment_experts is not None
    if "bias" in balance and not chooses_segments and _selection_is(kind, "balances"):
        problem = f"names bias, and {routing.selection} balances by itself"
        others = [name for name in balance if name != "bias"]
        yield kind.fault("balance selection", routing.balance, problem, f"use {show(others)}")


def options_are_used(kind: _Kind) -> Iterator[Fault]:
    routing = kind.routing
    names = [routing.selection or "", routing.gate, *(routing.balance or [])]
    if routing.options and not any(map(is_path, names)):
        problem = "is for rules of other packages, and none is named"
        mend = "remove it, or name a class in selection, gate or balance"
        yield kind.fault("options selection gate balance", routing.options, problem, mend)


_KIND_RULES: tuple[KindRule, ...] = (
    shared_experts_leave_some,
    choices_fit_experts,
    segments_are_whole,
    something_chooses,
    rules_are_known,
    causal_models_look_back,
    gates_have_slope,
    capacity_limits_patches,
    bias_has_an_effect,
    options_are_used,
)


def routing_fits(config: RunConfig) -> Iterator[Fault]:
    """Every rule about routing, for each kind of block."""
    for kind in _kinds(config):
        for rule in _KIND_RULES:
            yield from rule(kind)


def routers_are_there(config: RunConfig) -> Iterator[Fault]:
    if config.training.trains == "routers" and not config.routed_blocks:
        fields = ("training.trains", "feed_forward.routed_layers", "attention.routed_layers")
        problem = "leaves nothing to train, as no layer is routed"
        yield Fault(fields, "routers", problem, 'route layers, or use "all"')


def teacher_stands_still(config: RunConfig) -> Iterator[Fault]:
    weight = config.distillation.weight
    if weight > 0 and config.training.trains != "routers":
        yield Fault(
            ("distillation.weight", "training.trains"),
            weight,
            'has the model learn from its own weights, which training.trains = "all" moves',
            'set training.trains to "routers", or use 0',
        )
