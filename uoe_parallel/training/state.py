"""Between the engine's state and checkpoint entries: the one place that reaches into DeepSpeed.

Every parameter has the entries "<name>/weight" (in the model's dtype), "<name>/exp_avg" and
"<name>/exp_avg_sq", and in bf16 runs "<name>/master", the fp32 weight: full tensors, described by
global shape and offset, whatever ZeRO stage and layout held them. Routing rules that move between
steps have entries of their own (`routing_state`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from uoe_parallel.checkpoint import CheckpointReader, Piece
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.random import random_setters, random_states
from uoe_parallel.parallel.sharding import Shard, is_owner, named_shards
from uoe_parallel.training.routing_state import capture_rules, restore_rules

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    """Without ZeRO: each parameter's fp32 weight, which in fp32 runs is the parameter itself."""
    wrapper = engine.optimizer
    if engine.zero_optimization() or isinstance(wrapper, BF16_Optimizer):
        return {}
    if hasattr(wrapper, "fp16_groups"):  # DeepSpeed's name also for bf16
        params = itertools.chain.from_iterable(wrapper.fp16_groups)
        return dict(zip(params, itertools.chain.from_iterable(wrapper.fp32_groups), strict=True))
    return {param: param for param in engine.module.parameters()}


def capture(
    engine: Any, model: LanguageModel, groups: ParallelGroups, *, masters: bool
) -> list[Piece]:
    """The pieces this rank has to write: weights, moments, masters, routing rules, random state.

    Collective over the ranks that hold the same parts: ZeRO's partitions are put together
    parameter by parameter. Of these ranks the first writes.
    """
    pieces: list[Piece] = []
    for name, param, shard in named_shards(model, groups):
        writes = is_owner(param, groups)
        for kind, full in _full_tensors(engine, param, masters):
            if writes:
                local = full.detach().cpu().reshape(shard.shape).clone()
                pieces.append(Piece(f"{name}/{kind}", local, shard.global_shape, shard.offsets))
    pieces += capture_rules(model.routed_blocks(), groups)
    for key, state in random_states(groups).items():
        pieces.append(Piece.whole(key, state))
    return pieces


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
    saved, masters = reader.keys(), _plain_masters(engine)
    failure: Exception | None = None
    for name, param, shard in named_shards(model, groups):
        try:
            values = _read_values(reader, name, shard)
        except (OSError, SafetensorError) as error:
            # What follows is collective: a rank that cannot read must not leave the others in it.
            failure = failure or error
            values = dict.fromkeys(("weight", *MOMENTS), torch.zeros(shard.shape))
        values = {kind: value.to(engine.device) for kind, value in values.items()}
        _set_weight(param, values["weight"])
        _set_full(engine, masters, param, values.get("master", values["weight"]), None)
        for moment in MOMENTS:
            _set_full(engine, masters, param, values[moment], moment)
    with shared_fate(f"{reader.path} cannot be read", "See to the named file", groups.world):
        if failure is not None:
            raise failure
        restore_rules(model.routed_blocks(), reader)
    for key, setter in random_setters(groups).items():
        # A layout with more ranks than the saved one keeps the state its seed gave it.
        if key in saved:
            setter(reader.read(key))


def _read_values(reader: CheckpointReader, name: str, shard: Shard) -> dict[str, Tensor]:
    """A parameter's entries by kind."""
    saved = reader.keys()
    return {
        kind: reader.read(f"{name}/{kind}", shard.offsets, shard.shape)
        for kind in ("weight", "master", *MOMENTS)
        if f"{name}/{kind}" in saved
    }


def _full_tensors(engine: Any, param: nn.Parameter, masters: bool) -> Iterator[tuple[str, Tensor]]:
    """This tensor rank's whole weight, moments and, if asked, master."""
    with _gathered(param):
        yield "weight", param.detach().clone()
    plain = _plain_masters(engine)
    if masters:
        yield "master", plain[param] if plain else _found(safe_get_full_fp32_param(param))
    for moment in MOMENTS:
        if plain:
            yield moment, base_optimizer(engine).state[plain[param]][moment]
        else:
            yield moment, _found(safe_get_full_optimizer_state(param, moment))


def _found(value: Tensor | None) -> Tensor:
    assert value is not None, "DeepSpeed does not know this parameter"
    return value


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
