"""Between the engine's state and checkpoint entries: the one place that reaches into DeepSpeed.

Every parameter has the entry "<name>/weight" (in the model's dtype), and one that is trained has
"<name>/exp_avg", "<name>/exp_avg_sq" and in bf16 runs "<name>/master", the fp32 weight: full
tensors, described by global shape and offset, whatever ZeRO stage and layout held them. Routing
rules that move between steps have entries of their own (`routing_state`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from operator import add
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from uoe_parallel.checkpoint import CheckpointReader, Piece
from uoe_parallel.inference.rules import restore_rules
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.random import random_setters, random_states
from uoe_parallel.parallel.sharding import (
    boxes,
    counts_once,
    is_wide,
    named_shards,
    parameter_shape,
)
from uoe_parallel.training.routing_state import capture_rules

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", "master", *MOMENTS)
"""Of a parameter's entries."""


def base_optimizer(engine: Any) -> Optimizer:
    """The AdamW inside DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def create_moments(engine: Any) -> None:
    """Give AdamW the state that it would otherwise make in its first step.

    DeepSpeed links parameters to their moments after the first step of its first parameter
    group, when the other groups have none yet, and never again: without this only the first
    group's moments could be saved. In bf16 without ZeRO it makes them by a step on gradients of
    zero, which weight decay makes smaller weights of: masters are set back.
    """
    for param, master in _plain_masters(engine).items():
        master.data.copy_(param.data)
    optimizer = base_optimizer(engine)
    for group, param in _stepped_tensors(engine):
        on_device = group.get("fused") or group.get("capturable")
        count = torch.zeros((), device=param.device if on_device else "cpu")
        moments = {name: torch.zeros_like(param) for name in MOMENTS}
        optimizer.state[param] = {"step": count, **moments}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _stepped_tensors(engine: Any) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What AdamW steps on, with its group: parameters, masters, or ZeRO's flat partitions."""
    groups = base_optimizer(engine).param_groups
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if flat is not None:  # ZeRO 3 lends them to AdamW for the time of a step only
        for number, partition in enumerate(flat):
            yield groups[engine.optimizer.sub_group_to_group_id[number]], partition
        return
    for group in groups:
        for param in group["params"]:
            yield group, param


def _plain_masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Without ZeRO: each trained parameter's fp32 weight, in fp32 runs the parameter itself."""
    wrapper = engine.optimizer
    if engine.zero_optimization() or isinstance(wrapper, BF16_Optimizer):
        return {}
    if hasattr(wrapper, "fp16_groups"):  # DeepSpeed's name also for bf16
        params = itertools.chain.from_iterable(wrapper.fp16_groups)
        return dict(zip(params, itertools.chain.from_iterable(wrapper.fp32_groups), strict=True))
    return {param: param for param in engine.module.parameters() if param.requires_grad}


def replicated_states(engine: Any) -> dict[nn.Parameter, dict[str, Tensor]]:
    """What every replica of a parameter holds beside its weight, by the kinds of `capture`: empty
    where DeepSpeed cuts masters and moments over replicas."""
    state = base_optimizer(engine).state
    return {
        param: {
            **({} if master is param else {"master": master.detach()}),
            **{moment: state[master][moment] for moment in MOMENTS},
        }
        for param, master in _plain_masters(engine).items()
    }


def capture(
    engine: Any, model: LanguageModel, groups: ParallelGroups, *, masters: bool
) -> list[Piece]:
    """The pieces this rank has to write, copied to the host: weights, moments and, if asked,
    masters, routing rules, random state.

    Nothing is sent. Of each parameter a rank writes the elements whose moments it keeps, or an even
    share where ranks keep the same.
    """
    pieces: list[Piece] = []
    shares, plain = _even_shares(model, groups), _plain_masters(engine)
    for name, param, shard in named_shards(model, groups):
        if not counts_once(param, groups):
            continue
        start, kinds = _kept(engine, plain, param, shares[param])
        for kind, values in kinds.items():
            if kind == "master" and not masters:
                continue
            for box, at in boxes(shard.shape, start, values.numel()):
                local = values.narrow(0, at, math.prod(box.shape)).detach().to("cpu", copy=True)
                offsets = tuple(map(add, shard.offsets, box.offsets))
                key = f"{name}/{kind}"
                pieces.append(Piece(key, local.view(box.shape), shard.global_shape, offsets))
    pieces += capture_rules(model.routed_blocks(), groups)
    for key, state in random_states(groups).items():
        pieces.append(Piece.whole(key, state))
    return pieces


def _even_shares(model: LanguageModel, groups: ParallelGroups) -> dict[nn.Parameter, slice]:
    """Of each parameter's elements this rank's share, if ranks that hold the same parameters put
    them in a row and cut that into equal parts."""
    shares: dict[nn.Parameter, slice] = {}
    params = [param for param in model.parameters() if counts_once(param, groups)]
    for group, of_experts in ((groups.data, False), (groups.expert_data, True)):
        row = [param for param in params if is_wide(param) == of_experts]
        sizes = [math.prod(parameter_shape(param)) for param in row]
        first, last = (
            sum(sizes) * rank // group.size() for rank in (group.rank(), group.rank() + 1)
        )
        for param, size, end in zip(row, sizes, itertools.accumulate(sizes), strict=True):
            begin = end - size
            shares[param] = slice(max(first - begin, 0), max(min(last - begin, size), 0))
    return shares


def _kept(
    engine: Any, plain: dict[nn.Parameter, Tensor], param: nn.Parameter, share: slice
) -> tuple[int, dict[str, Tensor]]:
    """The first element of the flattened parameter that this rank writes, and from there on its
    weight, master and moments, flat. `share`: what it writes of a parameter that ranks keep
    alike."""
    if not param.requires_grad and not hasattr(param, "ds_id"):
        return share.start, {"weight": param.flatten()[share]}
    if plain:
        master = plain[param]
        state = base_optimizer(engine).state[master]
        whole = {"weight": param, "master": master, **{name: state[name] for name in MOMENTS}}
        return share.start, {kind: values.flatten()[share] for kind, values in whole.items()}
    held: Any = param  # and what DeepSpeed has set on it
    if hasattr(param, "ds_id"):
        size = held.ds_tensor.ds_numel
        start = size * held.ds_process_group.rank()
        parts = {"weight": held.ds_tensor}
        if param.requires_grad:
            parts["master"] = safe_get_local_fp32_param(param)
            parts |= {name: safe_get_local_optimizer_state(param, name) for name in MOMENTS}
        # The last partition ends in padding.
        size = max(min(size, held.ds_numel - start), 0)
        return start, {kind: values.flatten()[:size] for kind, values in parts.items()}
    fragment = held._hp_mapping
    if fragment is None:  # all of it is in other ranks' partitions
        return 0, {}
    place = fragment.lp_fragment_address
    return place.start, {
        "weight": param.flatten()[place.start : place.start + place.numel],
        "master": fragment.get_hp_fragment(),
        **{name: fragment.get_hp_fragment(name) for name in MOMENTS},
    }


def restore(
    engine: Any,
    model: LanguageModel,
    groups: ParallelGroups,
    reader: CheckpointReader,
    updates: int,
) -> None:
    """Load what `capture` saved after AdamW had moved the weights `updates` times. Collective over
    all ranks."""
    for _, tensor in _stepped_tensors(engine):
        base_optimizer(engine).state[tensor]["step"].fill_(updates)
    for group in base_optimizer(engine).param_groups:
        if "step" in group:  # apex counts per group
            group["step"] = updates
    _load(engine, model, groups, reader, KINDS)
    saved = reader.keys()
    for key, setter in random_setters(groups).items():
        # A layout with more ranks than the saved one keeps the state its seed gave it.
        if key in saved:
            setter(reader.read(key))


def adopt(
    engine: Any, model: LanguageModel, groups: ParallelGroups, reader: CheckpointReader
) -> None:
    """Load weights and routing rules of another run's checkpoint; what it lacks stays as it is.
    Collective over all ranks."""
    _load(engine, model, groups, reader, ("weight",))


def _load(
    engine: Any,
    model: LanguageModel,
    groups: ParallelGroups,
    reader: CheckpointReader,
    kinds: Sequence[str],
) -> None:
    """These kinds of every parameter's entries, and routing rules, as far as they were saved."""
    saved, masters = reader.keys(), _plain_masters(engine)
    failure: Exception | None = None
    for name, param, shard in named_shards(model, groups):
        found = [kind for kind in kinds if f"{name}/{kind}" in saved]
        if not found:
            continue
        try:
            values = {k: reader.read(f"{name}/{k}", shard.offsets, shard.shape) for k in found}
        except (OSError, SafetensorError) as error:
            # What follows is collective: a rank that cannot read must not leave the others in it.
            failure = failure or error
            values = dict.fromkeys(found, torch.zeros(shard.shape))
        values = {kind: value.to(engine.device) for kind, value in values.items()}
        _set_weight(param, values["weight"])
        if not param.requires_grad:
            continue
        _set_full(engine, masters, param, values.get("master", values["weight"]), None)
        for moment in filter(values.__contains__, MOMENTS):
            _set_full(engine, masters, param, values[moment], moment)
    with shared_fate(f"{reader.path} cannot be read", "See to the named file", groups.world):
        if failure is not None:
            raise failure
        restore_rules(model.routed_blocks(), reader)


def _gathered(param: nn.Parameter, modifier_rank: int | None = None) -> Any:
    """The whole parameter under ZeRO 3 for the time of a block; nothing to do elsewhere."""
    return deepspeed.zero.GatheredParameters(
        [param], modifier_rank=modifier_rank, enabled=hasattr(param, "ds_id")
    )


def _set_weight(param: nn.Parameter, weight: Tensor) -> None:
    with torch.no_grad(), _gathered(param, modifier_rank=0):
        param.copy_(weight)


def _set_full(
    engine: Any,
    plain: dict[nn.Parameter, Tensor],
    param: nn.Parameter,
    value: Tensor,
    moment: str | None,
) -> None:
    """Set a moment, or with None the fp32 weight."""
    if plain:
        master = plain[param]
        target = master.data if moment is None else base_optimizer(engine).state[master][moment]
        target.copy_(value)
    elif moment is None:
        safe_set_full_fp32_param(param, value.float())
    else:
        safe_set_full_optimizer_state(param, value, moment)
