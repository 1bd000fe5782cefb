"""Checkpoints of models that were never trained, as the rank processes write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.model.cases import build_model, random_tokens, start
from uoe_parallel.checkpoint import Piece, save_checkpoint
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.model.running_rules import named_rules, rule_states
from uoe_parallel.parallel.device import DTYPES
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.sharding import is_owner, named_shards

STEP = 3


def save_and_run(configs: Sequence[RunConfig], *, all_experts: bool = False) -> list[Tensor]:
    """On every rank: for each config of one layout, save a new model to its run_dir, and return the
    model's logits [B, S, V] of `random_tokens`, with every expert on if asked."""
    groups = start(configs[0])
    found: list[Tensor] = []
    for config in configs:
        model = new_model(config, groups)
        save(model, groups, config)
        found.append(logits(model, config, all_experts=all_experts))
    return found


def new_model(config: RunConfig, groups: ParallelGroups) -> LanguageModel:
    """Nothing in it is zero, or the same for all experts: biases and norms are random, and rules
    as if of some steps."""
    model = build_model(config, groups, DTYPES[config.training.precision]).eval()
    with torch.no_grad():
        for name, param, shard in named_shards(model, groups):
            if name.endswith("bias") or "norm" in name:
                generator = torch.Generator().manual_seed(len(name))
                noise = torch.randn(shard.global_shape, generator=generator)
                param += 0.3 * noise[shard.index].to(param)
    for _, rule in named_rules(model.routed_blocks()):
        for name in ("threshold", "bias"):
            if name in rule.state:
                count = len(rule.state[name])
                rule.state[name] = torch.linspace(-0.3, 0.3, count, dtype=torch.float64)
    return model


def save(model: LanguageModel, groups: ParallelGroups, config: RunConfig) -> None:
    """Collective over all ranks."""
    pieces = [
        Piece(f"{name}/weight", param.detach(), shard.global_shape, shard.offsets)
        for name, param, shard in named_shards(model, groups)
        if is_owner(param, groups)
    ]
    if groups.world.rank() == 0:
        states = rule_states(model.routed_blocks())
        pieces += [Piece.whole(name, value) for name, value in states]
    state = {"config": config.model_dump(mode="json")}
    save_checkpoint(Path(config.run_dir, "checkpoints"), STEP, pieces, state, groups.world, None)


@torch.no_grad()
def logits(model: LanguageModel, config: RunConfig, *, all_experts: bool) -> Tensor:
    tokens_BS = random_tokens(config)
    if all_experts:
        with model.all_experts():
            found = model(tokens_BS)
    else:
        found = model(tokens_BS)
    assert isinstance(found, Tensor)
    return found
