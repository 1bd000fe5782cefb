"""Steps under every routing rule are the same on one rank and on several: losses, norms, weights,
moments and what rules learn (UoE 6.5)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import Ranks
from tests.model.cases import relative_difference
from tests.tiny import tiny_config
from tests.training.cases import Outcome, assemble, run_engine
from uoe_parallel.config.schema import RunConfig

# Two rules a model: one in each kind of block.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "threshold, bias": (
        {"selection": "threshold", "threshold_warmup": 1},
        {"balance": ["bias", "sequence_loss"], "capacity_factor": 1.0},
    ),
    "patches with capacity, segments": (
        {"patch_length": 3, "capacity_factor": 0.75},
        {"selection": None, "segment_length": 5, "segment_experts": 2},
    ),
    "segments then patches, threshold of patches": (
        {"patch_length": 2, "segment_length": 6, "segment_experts": 4, "balance": ["bias"]},
        {"selection": "threshold", "threshold_warmup": 0, "patch_length": 3, "gate": "relu"},
    ),
    "shared, softmax of chosen": (
        {"shared_experts": 2, "gate": "softmax"},
        {"shared_experts": 1, "gate": "softmax_of_chosen"},
    ),
    "relu, queries only": (
        {"gate": "relu"},
        {"keys_and_values": "all", "capacity_factor": 1.0},
    ),
}
BIDIRECTIONAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "expert choice, segments": (
        {"selection": "expert_choice", "patch_length": 2},
        {"segment_length": 5, "segment_experts": 3, "patch_length": 1, "gate": "relu"},
    ),
}
LAYOUTS = [
    pytest.param(2, {"tensor": 2}, id="tp2-sp", marks=pytest.mark.slow),
    pytest.param(2, {"tensor": 2, "sequence_parallel": False}, id="tp2", marks=pytest.mark.slow),
    pytest.param(2, {"expert": 2}, id="dp2-ep2", marks=pytest.mark.slow),
    pytest.param(4, {"tensor": 2, "expert": 4}, id="tp2-sp-dp2-ep4"),
    pytest.param(4, {"tensor": 2, "pipeline": 2}, id="tp2-sp-pp2", marks=pytest.mark.slow),
]
# Every kind of block spreads, so that wide groups are met by each rule.
WIDE = {"spread": "expert"}


def config_of(
    rules: tuple[dict[str, Any], dict[str, Any]], parallel: dict[str, Any], causal: bool
) -> RunConfig:
    feed_forward, attention = rules
    return tiny_config(
        model={} if causal else {"task": "masked_token"},
        feed_forward=feed_forward,
        attention=attention | WIDE,
        parallel={"zero_stage": 0} | parallel,
        training={"precision": "fp64", "micro_batch_size": 1},
    )


CASES = [(name, rules, True) for name, rules in MODELS.items()]
CASES += [(name, rules, False) for name, rules in BIDIRECTIONAL.items()]


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks) -> dict[str, Outcome]:
    return {
        name: ranks(1).run(run_engine, config_of(rules, {}, causal))[0]
        for name, rules, causal in CASES
    }


@pytest.mark.parametrize(("name", "rules", "causal"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_every_layout_takes_the_same_steps(
    ranks: Ranks,
    one_rank: dict[str, Outcome],
    name: str,
    rules: tuple[dict[str, Any], dict[str, Any]],
    causal: bool,
    world: int,
    parallel: dict[str, Any],
) -> None:
    alone = one_rank[name]
    outcomes = ranks(world).run(run_engine, config_of(rules, parallel, causal))
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(alone.losses, rel=1e-11)
        assert outcome.gradient_norms == pytest.approx(alone.gradient_norms, rel=1e-10)
    worst, parameter = relative_difference(assemble(outcomes), assemble([alone]), eps=1e-6)
    assert worst < 1e-7, parameter


def test_what_rules_learn_moves_and_is_captured(one_rank: dict[str, Outcome]) -> None:
    full = assemble([one_rank["threshold, bias"]])
    for layer in range(2):
        prefix = f"layers.{layer}"
        assert full[f"{prefix}.feed_forward/router/Threshold/threshold"].any()
        assert full[f"{prefix}.feed_forward/router/Threshold/steps"].item() == 3
        assert full[f"{prefix}.attention/router/LoadBias/bias"].any()


def test_the_loss_of_a_batch_depends_on_the_micro_batch_of_all_ranks_alone(ranks: Ranks) -> None:
    """Two ranks of one sequence are as one of two."""
    rule = {"balance": ["batch_loss"], "balance_loss": 1.0}
    found = [
        ranks(world).run(
            run_engine,
            tiny_config(
                feed_forward=rule,
                attention=rule,
                parallel={"zero_stage": 0},
                training={"precision": "fp64", "micro_batch_size": micro},
            ),
        )[0]
        for world, micro in ((1, 2), (2, 1), (1, 1))
    ]
    alone, two, other = (outcome.gradient_norms for outcome in found)
    assert two == pytest.approx(alone, rel=1e-11)
    assert other != pytest.approx(alone, rel=1e-6), "it is a loss of the batch"
