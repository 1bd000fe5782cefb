"""What is computed for a simulated rank is what the rank of a real run does."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.analysis.cases import Purposes, RealStep, simulate, take_steps
from tests.harness import Ranks
from tests.tiny import GPT_2, tiny_config, write_corpus
from uoe_parallel.analysis.observe import Observed
from uoe_parallel.analysis.simulate import Simulation
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.labelled import write_labelled_documents

ONE_SEQUENCE: dict[str, Any] = {"micro_batch_size": 1}  # so that micro-batches add up to a step
RECOMPUTE: dict[str, Any] = {"recompute": "full"}
SELECTIVE: dict[str, Any] = {"recompute": "selective"}
DENSE: dict[str, Any] = {"routed_layers": "none"}
FIRST: dict[str, Any] = {"routed_layers": [0]}
NARROW: dict[str, Any] = {"hidden_size": 10, "num_heads": 5, "num_kv_heads": 5}
"""Of sizes that have to be padded before they are cut."""
RELEASED = {
    "stage3_param_persistence_threshold": 9,
    "stage3_max_reuse_distance": 2500,
    "stage3_prefetch_bucket_size": 1500,
    "stage3_max_live_parameters": 5000,
    "sub_group_size": 200,
    "reduce_bucket_size": 1500,
}
"""Limits between the sizes of a narrow model's parameters and of all of them."""
NEVER_KEPT = dict.fromkeys(
    (
        "stage3_param_persistence_threshold",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_max_live_parameters",
    ),
    0,
)

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"parallel": {"zero_stage": 0}}),
    "tp2-sp": (2, {"parallel": {"tensor": 2, "zero_stage": 0}, "training": ONE_SEQUENCE}),
    "tp2": (
        2,
        {
            "parallel": {"tensor": 2, "zero_stage": 0, "sequence_parallel": False},
            "feed_forward": FIRST,
        },
    ),
    "tp2-sp, GPT-2's parts": (
        2,
        {
            "parallel": {"tensor": 2, "zero_stage": 1},
            "model": GPT_2,
            "training": ONE_SEQUENCE | RECOMPUTE,
        },
    ),
    "dp2-zero3, GPT-2's parts": (
        2,
        {
            "parallel": {"zero_stage": 3},
            "model": GPT_2,
            "feed_forward": FIRST,
            "attention": DENSE,
            "deepspeed": {"zero_optimization": NEVER_KEPT},
        },
    ),
    "pp2-zero1, GPT-2's parts": (
        2,
        {
            "parallel": {"pipeline": 2, "zero_stage": 1},
            "model": GPT_2,
            "data": {"reset_at_documents": True},
        },
    ),
    "tp2-sp dense": (
        2,
        {
            "parallel": {"tensor": 2, "zero_stage": 1},
            "feed_forward": FIRST,
            "attention": DENSE,
            "model": {"bias": False, "tie_embeddings": False},
        },
    ),
    **{
        f"dp2-zero{stage}": (2, {"parallel": {"zero_stage": stage}, "training": ONE_SEQUENCE})
        for stage in range(4)
    },
    "dp2-zero1 in buckets": (
        2,
        {
            "parallel": {"zero_stage": 1},
            "model": NARROW | {"bias": False},
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 500}},
        },
    ),
    "dp4-zero3 released": (
        4,
        {
            "parallel": {"zero_stage": 3},
            "model": NARROW,
            "training": ONE_SEQUENCE,
            "deepspeed": {"zero_optimization": RELEASED},
        },
    ),
    "dp2-zero3 never kept": (
        2,
        {
            "parallel": {"zero_stage": 3},
            "attention": DENSE,
            "model": {"tie_embeddings": False},
            "deepspeed": {"zero_optimization": NEVER_KEPT},
        },
    ),
    "dp2-zero3 recomputed": (
        2,
        {
            "parallel": {"zero_stage": 3},
            "attention": DENSE,
            "training": ONE_SEQUENCE | RECOMPUTE,
            "deepspeed": {"zero_optimization": NEVER_KEPT},
        },
    ),
    "dp2-zero3 selective": (
        2,
        {
            "parallel": {"zero_stage": 3},
            "feed_forward": FIRST,
            "training": ONE_SEQUENCE | SELECTIVE,
            "deepspeed": {"zero_optimization": NEVER_KEPT},
        },
    ),
    "tp2-sp selective": (
        2,
        {
            "parallel": {"tensor": 2, "zero_stage": 1},
            "feed_forward": FIRST,
            "attention": DENSE,
            "training": ONE_SEQUENCE | SELECTIVE,
        },
    ),
    "tp2-sp rules": (
        2,
        {
            "parallel": {"tensor": 2, "zero_stage": 1},
            "feed_forward": {"patch_length": 3, "capacity_factor": 1.0, "shared_experts": 1},
            "attention": {
                "segment_length": 4,
                "segment_experts": 3,
                "patch_length": 2,
                "selection": "threshold",
                "threshold_warmup": 0,
            },
            "training": ONE_SEQUENCE,
        },
    ),
    "tp2-dp2 rules": (
        4,
        {
            "parallel": {"tensor": 2, "zero_stage": 0, "sequence_parallel": False},
            "feed_forward": {"balance": ["bias", "batch_loss"]},
            "attention": {"segment_length": 4, "segment_experts": 3, "selection": None},
        },
    ),
    "tp2-sp queries": (
        2,
        {
            "parallel": {"tensor": 2, "zero_stage": 1},
            "attention": {"keys_and_values": "all"},
            "training": ONE_SEQUENCE | RECOMPUTE,
        },
    ),
    "tp2-sp-dp2-ep4 queries": (
        4,
        {
            "parallel": {"tensor": 2, "expert": 4, "zero_stage": 0},
            "attention": {"keys_and_values": "all", "spread": "expert"},
        },
    ),
    "tp2-sp-dp2-ep4 rules": (
        4,
        {
            "parallel": {"tensor": 2, "expert": 4, "zero_stage": 1},
            "feed_forward": {"balance": ["bias", "batch_loss"], "capacity_factor": 1.0},
            "attention": {"spread": "expert", "selection": "threshold"},
            "training": ONE_SEQUENCE | RECOMPUTE,
        },
    ),
    "tp2-sp-dp2-ep4 recomputed": (
        4,
        {
            "parallel": {"tensor": 2, "expert": 4, "zero_stage": 1},
            "model": {"dropout": 0.1},
            "training": ONE_SEQUENCE | RECOMPUTE,
        },
    ),
    "tp2-pp2 recomputed": (
        4,
        {
            "parallel": {
                "tensor": 2,
                "pipeline": 2,
                "zero_stage": 0,
                "sequence_parallel": False,
            },
            "feed_forward": DENSE,
            "training": ONE_SEQUENCE | RECOMPUTE,
        },
    ),
    "pp2-zero0": (2, {"parallel": {"pipeline": 2, "zero_stage": 0}, "training": ONE_SEQUENCE}),
    "pp2-zero1 untied": (
        2,
        {"parallel": {"pipeline": 2, "zero_stage": 1}, "model": {"tie_embeddings": False}},
    ),
    "dp2-ep2": (2, {"parallel": {"expert": 2, "zero_stage": 1}, "training": ONE_SEQUENCE}),
    "dp2-ep2 documents": (
        2,
        {"parallel": {"expert": 2, "zero_stage": 1}, "data": {"reset_at_documents": True}},
    ),
    "tp2-sp classes": (
        2,
        {
            "parallel": {"tensor": 2, "zero_stage": 1},
            "model": {"task": "classification", "num_classes": 3},
        },
    ),
    "tp2-sp-pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2, "zero_stage": 1}}),
    "tp2-sp-dp2-ep4": (
        4,
        {
            "parallel": {"tensor": 2, "expert": 4, "zero_stage": 2},
            "attention": {"spread": "expert"},
            "training": ONE_SEQUENCE,
        },
    ),
    "tp2-sp-dp2 bf16": (
        4,
        {
            "parallel": {"tensor": 2, "zero_stage": 0},
            "training": ONE_SEQUENCE | {"precision": "bf16"},
        },
    ),
    "dp2-zero1 bf16": (
        2,
        {"parallel": {"zero_stage": 1}, "training": ONE_SEQUENCE | {"precision": "bf16"}},
    ),
    "pp2-dp2-ep2 bf16": (
        4,
        {
            "parallel": {"pipeline": 2, "expert": 2, "zero_stage": 1},
            "training": ONE_SEQUENCE | {"precision": "bf16"},
        },
    ),
    "tp2-dp2-zero2 bf16": (
        4,
        {
            "parallel": {"tensor": 2, "zero_stage": 2},
            "training": ONE_SEQUENCE | {"precision": "bf16"},
        },
    ),
    "tp2-sp-pp2 fp64": (
        4,
        {
            "parallel": {"tensor": 2, "pipeline": 2, "zero_stage": 0},
            "training": {"precision": "fp64"},
        },
    ),
    "tp2-sp-pp2-dp2-ep4": (
        8,
        {
            "parallel": {"tensor": 2, "pipeline": 2, "expert": 4, "zero_stage": 1},
            "training": ONE_SEQUENCE,
        },
    ),
}


SLOW = (
    *("tp2-sp-dp2 bf16", "tp2-dp2-zero2 bf16", "tp2-sp-pp2 fp64", "tp2-pp2 recomputed"),
    *("tp2-sp-dp2-ep4", "tp2-sp-dp2-ep4 queries", "tp2-sp-pp2", "tp2-sp dense"),
    *("dp2-zero3 never kept", "dp2-zero3 selective"),
)
"""Mixes of what the other cases have each by itself."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in CASES],
)
def test_simulation_is_exact(ranks: Ranks, tmp_path: Path, name: str) -> None:
    world, sections = CASES[name]
    corpus = write_corpus(tmp_path / "corpus")
    data = sections.get("data", {}) | {"train": str(corpus)}
    config = tiny_config(**sections | {"data": data}, run_dir=str(tmp_path / "run"))
    if config.model.num_classes is not None:
        write_labelled_documents(corpus, [np.arange(1 + n % 16) for n in range(32)], [0, 1] * 16)
    steps = ranks(world).run(take_steps, config)
    simulated = _simulate(ranks, config, world, steps)
    for step, simulation in zip(steps, simulated, strict=True):
        assert _sums(simulation) == step.seen
        assert simulation.shapes == step.shapes
        assert simulation.states.weights == step.weights
        assert set(step.gradients) <= {simulation.states.gradients}
        assert simulation.states.optimizer == step.optimizer


def _simulate(
    ranks: Ranks, config: RunConfig, world: int, steps: list[RealStep]
) -> list[Simulation]:
    """All ranks of the same run, without data, told how many rows its exchanges moved."""
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": "not there"})}
    )
    exchanges = [step.exchanges for step in steps]
    (simulations,) = ranks(1).run(simulate, config, world, range(world), exchanges)
    return simulations


def _sums(simulation: Simulation) -> Purposes:
    """As an observer counts: two groups of the same ranks are one."""
    sums: dict[Any, list[int]] = defaultdict(lambda: [0, 0, 0])
    for transfer in simulation.traffic:
        ranks = simulation.groups[transfer.group]
        total = sums[transfer.purpose, transfer.phase, transfer.operation, ranks]
        total[0] += transfer.calls
        total[1] += transfer.payload
        total[2] += transfer.kept
    return {key: Observed(*total) for key, total in sums.items()}
