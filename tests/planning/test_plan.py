"""A plan agrees with the simulation of its ranks, and with itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.harness import RankError, Ranks
from tests.planning.cases import machine, plan_alone, plan_and_simulate
from tests.tiny import tiny_config
from uoe_parallel.planning.plan import Plan
from uoe_parallel.planning.report import plan_as_json

CONFIG = tiny_config(
    model={"num_layers": 6},
    parallel={"tensor": 2, "pipeline": 3, "expert": 4, "zero_stage": 1},
    training={"global_batch_size": 64},
)


@pytest.fixture(scope="module")
def planned(ranks: Ranks) -> Plan:
    return ranks(1).run(plan_alone, CONFIG, 48, machine())[0]


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2, "pipeline": 3, "expert": 4, "zero_stage": 1},
        {"tensor": 2, "sequence_parallel": False, "zero_stage": 2},
        {"tensor": 1, "zero_stage": 3},
    ],
)
def test_bytes_are_those_of_a_simulation(ranks: Ranks, parallel: dict[str, Any]) -> None:
    config = tiny_config(
        model={"num_layers": 6}, parallel=parallel, training={"global_batch_size": 96}
    )
    ((planned, simulations),) = ranks(1).run(plan_and_simulate, config, 48, machine())
    for stage, simulation in zip(planned.stages, simulations, strict=True):
        assert stage.rank == simulation.rank
        assert stage.layers == simulation.layers
        assert stage.traffic == simulation.traffic
        assert stage.memory.weights == simulation.states.weights
        assert stage.memory.optimizer == simulation.states.optimizer
        groups = {name: len(members) for name, members in simulation.groups.items()}
        assert stage.group_sizes == groups
        assert planned.micro_batches == simulation.micro_batches


def test_stages_that_differ_are_looked_at(planned: Plan) -> None:
    assert [stage.stage for stage in planned.stages] == [0, 1, 2]
    assert [stage.rank for stage in planned.stages] == [0, 16, 32]
    # One-forward-one-backward keeps the most micro-batches on the first stage.
    kept = [stage.memory.activations for stage in planned.stages]
    assert kept[0] > kept[1]
    assert planned.fullest.memory.peak == max(stage.memory.peak for stage in planned.stages)


def test_other_settings_are_told(planned: Plan) -> None:
    fullest = planned.fullest
    assert fullest.recomputing["none"] == fullest.memory
    # A pipeline goes with no later stage of ZeRO.
    assert fullest.by_zero_stage.keys() == {0, 1}
    assert fullest.by_zero_stage[1] == fullest.memory
    assert fullest.by_zero_stage[1].optimizer < fullest.by_zero_stage[0].optimizer


def test_recomputation_and_routes_show_in_memory(planned: Plan) -> None:
    for stage in planned.stages:
        assert stage.memory == stage.recomputing["none"]
        assert stage.worst_memory.peak > stage.memory.peak
    # Where the most micro-batches are held.
    by_setting = planned.stages[0].recomputing
    kept = [by_setting[name].activations for name in ("full", "selective", "none")]
    assert kept == sorted(kept) and kept[0] < kept[2]


def test_rates_follow_from_time(planned: Plan) -> None:
    tokens = 64 * 16
    assert planned.tokens_per_second == tokens / planned.time.seconds
    operations = planned.flops.routed * tokens
    assert planned.utilisation == pytest.approx(operations / planned.time.seconds / (48 * 1e12))
    assert planned.dense_equivalent > planned.utilisation
    number, slowest = planned.micro_batches, planned.slowest.time.micro_batch
    assert planned.time.seconds >= (number + 2) * slowest
    assert planned.time.bubble == 2 / (number + 2)


def test_fitting_counts_the_allowance(ranks: Ranks, planned: Plan) -> None:
    peak = planned.fullest.memory.peak
    for memory, fits in ((peak, True), (peak - 1, False)):
        assert ranks(1).run(plan_alone, CONFIG, 48, machine(memory=memory))[0].fits == fits
    loose = machine(memory=peak, fragmentation=0.01)
    assert not ranks(1).run(plan_alone, CONFIG, 48, loose)[0].fits


def test_json_has_everything(planned: Plan) -> None:
    tree = json.loads(json.dumps(plan_as_json(planned)))
    assert tree["layout"]["name"] == "tp2-sp-pp3-dp8-ep4-zero1"
    assert tree["utilisation"] == planned.utilisation
    assert tree["stages"][1]["layers"] == list(planned.stages[1].layers)
    assert tree["stages"][0]["memory"]["weights"] == planned.stages[0].memory.weights
    assert tree["parameters"]["total"] == planned.parameters.total


@pytest.mark.parametrize(
    ("world", "precision", "told"),
    [
        (50, "fp32", "does not divide the world size of 50 ranks"),
        (48, "bf16", "training.precision = bf16: the hardware profile round has figures for fp32"),
    ],
)
def test_what_cannot_be_planned(ranks: Ranks, world: int, precision: str, told: str) -> None:
    training = CONFIG.training.model_copy(update={"precision": precision})
    config = CONFIG.model_copy(update={"training": training})
    with pytest.raises(RankError) as raised:
        ranks(1).run(plan_alone, config, world, machine())
    failure = raised.value.failures[0]
    assert failure.type_name == "UserError"
    assert told in failure.message
