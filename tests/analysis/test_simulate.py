"""One rank of a world that is not there."""

from __future__ import annotations

import itertools
from collections import defaultdict
from math import prod
from typing import Any

import pytest
import torch

from tests.analysis.cases import places_in_a_run, simulate, stage_is_on_meta
from tests.harness import RankError, Ranks
from tests.tiny import tiny_config
from uoe_parallel.analysis.simulate import Simulation
from uoe_parallel.analysis.transfer import Transfer
from uoe_parallel.config.schema import ParallelConfig, RunConfig
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.sharding import Shard


def _config(parallel: dict[str, Any], batch: int, model: dict[str, Any] | None = None) -> RunConfig:
    return tiny_config(
        model=model or {},
        feed_forward={"num_experts": 32},
        parallel=parallel,
        training={"global_batch_size": batch, "micro_batch_size": 1},
    )


AXES = {"tensor": 4, "pipeline": 2, "expert": 8, "zero_stage": 1}
SMALL = _config(AXES, batch=256)
LARGE = tiny_config(
    model={
        "num_layers": 16,
        "hidden_size": 2048,
        "ffn_size": 8192,
        "num_heads": 32,
        "num_kv_heads": 16,
        "sequence_length": 2048,
        "tie_embeddings": False,
    },
    feed_forward={"num_experts": 64, "top_k": 4},
    attention={"routed_layers": "all", "top_k": 4},
    parallel={"tensor": 8, "pipeline": 8, "expert": 32, "zero_stage": 1},
    training={"global_batch_size": 256, "micro_batch_size": 1, "precision": "bf16"},
)


def _expected_groups(layout: ParallelLayout, rank: int) -> dict[str, tuple[int, ...]]:
    """The axes' groups by definition: the ranks that differ on one axis alone."""
    own = layout.coordinates(rank)
    others = [(r, layout.coordinates(r)) for r in range(layout.world_size)]

    def same(*axes: str) -> tuple[int, ...]:
        return tuple(r for r, c in others if all(getattr(c, a) == getattr(own, a) for a in axes))

    return {
        "world": tuple(range(layout.world_size)),
        "tensor": same("data", "pipe"),
        "data": same("tensor", "pipe"),
        "pipe": same("tensor", "data"),
        "expert": same("expert_data", "pipe"),
        "expert_data": same("expert", "pipe"),
        "model": same("data"),
    }


@pytest.mark.parametrize(
    ("config", "world", "chosen"),
    [
        pytest.param(SMALL, 1024, (0, 517, 1023), id="1024"),
        pytest.param(LARGE, 4096, (0, 1234, 2777, 4095), id="4096"),
    ],
)
def test_any_rank_of_thousands(
    ranks: Ranks, config: RunConfig, world: int, chosen: tuple[int, ...]
) -> None:
    (simulations,) = ranks(1).run(simulate, config, world, chosen)
    layout = ParallelLayout.from_config(config.parallel, world)
    assert layout.sequence_parallel
    assert min(layout.tensor, layout.pipeline, layout.data, layout.expert_data) > 1
    assert layout.expert > layout.tensor
    for rank, simulation in zip(chosen, simulations, strict=True):
        expected = _expected_groups(layout, rank)
        assert simulation.groups.items() >= expected.items()
        stage, stages = layout.coordinates(rank).pipe, layout.pipeline
        neighbours = {stage - 1: "previous_stage", stage + 1: "next_stage"}
        for number, name in neighbours.items():
            if 0 <= number < stages:
                pair = tuple(sorted((rank, expected["pipe"][number])))
                assert simulation.groups[name] == pair
            else:
                assert name not in simulation.groups
        names = {place.name.split(".")[0] for place in simulation.parameters}
        tied = config.model.tie_embeddings and stage == stages - 1
        assert ("embedding" in names) == (stage == 0 or tied)
        assert ("final_norm" in names) == (stage == stages - 1)
        layers = {int(p.name.split(".")[1]) for p in simulation.parameters if "layers." in p.name}
        assert layers == set(simulation.layers)
        _check_traffic(simulation, config)


def _check_traffic(simulation: Simulation, config: RunConfig) -> None:
    """What follows from the layout without any formula of a collective."""
    layout, model = simulation.layout, config.model
    by_purpose: dict[tuple[str, str, str], Transfer] = {
        (t.purpose, t.phase, t.group): t for t in simulation.traffic
    }
    element = 2 if config.training.precision == "bf16" else 4
    length, batch, width = simulation.shapes["hidden states"]
    assert (length * layout.tensor, batch, width) == (
        model.sequence_length,
        config.training.micro_batch_size,
        model.hidden_size,
    )
    stage = simulation.groups["pipe"].index(simulation.rank)
    for phase, group, sends in (
        ("forward", "next_stage", stage < layout.pipeline - 1),
        ("backward", "previous_stage", stage > 0),
    ):
        purpose = "stage outputs" if phase == "forward" else "stage inputs"
        assert ((purpose, phase, group) in by_purpose) == sends
        if sends:
            sent = by_purpose[purpose, phase, group]
            assert sent.payload == simulation.micro_batches * length * batch * width * element
    # Top-k choices of tokens leave in pairs of a gate and a number, 4 bytes each; a token visits a
    # rank at most once.
    pairs = length * batch * config.feed_forward.top_k * len(simulation.layers)
    gates = by_purpose["dispatch gates", "forward", "expert"]
    rows = by_purpose["dispatch rows", "forward", "expert"]
    assert gates.payload == 8 * pairs * simulation.micro_batches
    assert 0 < rows.payload <= pairs * width * element * simulation.micro_batches
    assert 0 < rows.kept < rows.payload


def test_shards_of_all_ranks_tile_the_model(ranks: Ranks) -> None:
    """Of a slice of the world in which each part of the model lies once."""
    layout = ParallelLayout.from_config(SMALL.parallel, 1024)
    per_stage = layout.world_size // layout.pipeline
    chosen = [
        stage * per_stage + 3 * layout.expert + place
        for stage, place in itertools.product(range(layout.pipeline), range(layout.expert))
    ]
    (simulations,) = ranks(1).run(simulate, SMALL, layout.world_size, chosen)
    alone = SMALL.model_copy(update={"parallel": ParallelConfig(zero_stage=0)})
    ((whole,),) = ranks(1).run(simulate, alone, 1, [0])
    sharers = {"expert": layout.expert, "tensor": layout.tensor, None: 1}
    parts: dict[str, set[Shard]] = defaultdict(set)
    for simulation in simulations:
        for place in simulation.parameters:
            parts[place.name].add(place.shard)
            part = prod(place.shard.shape) * sharers[place.cut_over]
            assert part == prod(place.shard.global_shape), place.name
    assert parts.keys() == {place.name for place in whole.parameters}
    for place in whole.parameters:
        covered = torch.zeros(place.shard.shape, dtype=torch.int64)
        for shard in parts[place.name]:
            assert shard.global_shape == place.shard.shape
            covered[shard.index] += 1
        assert bool((covered == 1).all()), place.name


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (4, {"tensor": 2, "pipeline": 2}),
        (4, {"tensor": 2, "sequence_parallel": False}),
        (8, {"tensor": 2, "pipeline": 2, "expert": 4}),
    ],
)
def test_simulated_ranks_are_those_of_a_run(
    ranks: Ranks, world: int, parallel: dict[str, Any]
) -> None:
    config = _config(parallel, batch=8)
    real = ranks(world).run(places_in_a_run, config, 264)
    (simulations,) = ranks(1).run(simulate, config, world, range(world), vocab_size=264)
    assert [(s.groups, s.parameters) for s in simulations] == real


def test_stage_takes_no_memory(ranks: Ranks) -> None:
    assert ranks(2).run(stage_is_on_meta, _config({"pipeline": 2}, batch=2)) == [True, True]


def test_micro_batches_send_alike_unless_recorded(ranks: Ranks) -> None:
    config = _config({"tensor": 2, "zero_stage": 0}, batch=3)
    ((one,),) = ranks(1).run(simulate, config, 2, [1])
    ((again,),) = ranks(1).run(simulate, config, 2, [1])
    ((other,),) = ranks(1).run(simulate, config, 2, [1], seed=1)
    ((skewed,),) = ranks(1).run(simulate, config, 2, [1], skew=2.0)
    assert one == again
    assert len({str(s.traffic) for s in (one, other, skewed)}) == 3


@pytest.mark.parametrize(
    ("parallel", "world", "rank", "message"),
    [
        ({"tensor": 4}, 6, 0, "parallel.tensor = 4 does not divide the world size of 6 ranks"),
        ({"tensor": 2}, 1024, 1024, "rank 1024 is not in a world of 1024"),
        ({"tensor": 2}, 1024, -1, "rank -1 is not in a world of 1024"),
    ],
)
def test_rank_or_layout_that_cannot_be(
    ranks: Ranks, parallel: dict[str, Any], world: int, rank: int, message: str
) -> None:
    with pytest.raises(RankError) as raised:
        ranks(1).run(simulate, _config(parallel, batch=1024), world, [rank])
    failure = raised.value.failures[0]
    assert failure.type_name == "UserError"
    assert message in failure.message
