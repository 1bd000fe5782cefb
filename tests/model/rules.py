"""The routing rules that tests go through, and blocks whose scores are their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.experts.documents import Documents
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.context import Context
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.routing.router import Router

CAUSAL_RULES: dict[str, dict[str, Any]] = {
    "top-k": {},
    "capacity": {"capacity_factor": 1.0},
    "threshold": {"selection": "threshold", "threshold_warmup": 0},
    "patches": {"patch_length": 3},
    "patches that divide": {"patch_length": 4},
    "patches with capacity": {"patch_length": 3, "capacity_factor": 0.75},
    "segments": {"selection": None, "segment_length": 5, "segment_experts": 2},
    "segments, then patches": {
        "patch_length": 2,
        "segment_length": 4,
        "segment_experts": 3,
        "gate": "softmax",
    },
    "segments, then thresholds": {
        "selection": "threshold",
        "threshold_warmup": 0,
        "segment_length": 3,
        "segment_experts": 3,
    },
    "shared": {"shared_experts": 1},
    "shared with capacity": {"shared_experts": 1, "capacity_factor": 1.0, "top_k": 1},
    "bias": {"balance": ["bias", "sequence_loss"]},
    "batch loss": {"balance": ["batch_loss"]},
    "softmax of chosen": {"gate": "softmax_of_chosen"},
    "relu": {"gate": "relu"},
}
BIDIRECTIONAL_RULES: dict[str, dict[str, Any]] = {
    "top-k": {},
    "patches": {"patch_length": 3},
    "capacity": {"capacity_factor": 1.0, "patch_length": 2},
    "segments, then patches": {"patch_length": 2, "segment_length": 4, "segment_experts": 3},
    "expert choice": {"selection": "expert_choice"},
    "expert choice of patches": {"selection": "expert_choice", "patch_length": 3},
    "segments, then expert choice": {
        "selection": "expert_choice",
        "segment_length": 5,
        "segment_experts": 3,
        "gate": "softmax_of_chosen",
    },
    "threshold": {"selection": "threshold", "threshold_warmup": 0, "gate": "relu"},
}
RULES = [(name, True, rule) for name, rule in CAUSAL_RULES.items()]
RULES += [(name, False, rule) for name, rule in BIDIRECTIONAL_RULES.items()]


def config_of(rule: dict[str, Any]) -> RoutingConfig:
    return RoutingConfig.model_validate({"top_k": 2} | rule)


def scoring_block(
    config: RoutingConfig,
    groups: ParallelGroups,
    *,
    num_experts: int,
    context: int,
    causal: bool,
    dtype: torch.dtype = torch.float64,
) -> RoutedBlock:
    """A block without experts: each level's scores are a part of the hidden state, the segments'
    first. Learned state is as if of some steps."""
    router = Router(config, num_experts=num_experts, context=context, causal=causal)
    width = router.num_routed * len(router.levels)
    names = list(router.levels)

    def part(name: str) -> Any:
        first = names.index(f"{name}_weight") * router.num_routed
        return lambda weight: torch.eye(width)[first : first + router.num_routed]

    for rule in router.running:
        for state in ("threshold", "bias"):
            if state in rule.state:
                learned = torch.linspace(-0.5, 0.5, router.num_routed, dtype=torch.float64)
                rule.state[state] = learned
    return RoutedBlock(
        nn.Identity(),
        config,
        router,
        hidden_size=width,
        dtype=dtype,
        router_init=part,
        loss_weight_per_sequence=1.0,
        group=groups.tensor,
        expert_group=groups.tensor,
        data_group=groups.data,
        sequence_parallel=groups.layout.sequence_parallel,
    )


def packed(length: int, runs: list[list[int]]) -> Tensor:
    """Ids [B, S] of documents of the given lengths, the rest of each row being padding."""
    rows = []
    for row in runs:
        ids = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row))
        rows.append(torch.cat((ids, ids.new_full((length - len(ids),), -1))))
    return torch.stack(rows)


def decide(block: RoutedBlock, x_SBD: Tensor, documents: Documents) -> tuple[Tensor, Tensor, int]:
    """Mask and gates of this rank's tokens, and how many pairs were dropped."""
    decisions = block._decide(x_SBD, Context(documents, documents))
    routing = block._routing(decisions, documents)
    dropped = (decisions[-1].chosen_SBE & ~decisions[-1].mask_SBE).detach()
    if documents.real_SB is not None:
        dropped &= documents.real_SB[block._positions(documents)].unsqueeze(-1)
    return routing.mask_SBE, routing.gates_SBE, int(dropped.sum())
