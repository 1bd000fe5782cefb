"""DeepSpeed's steps under every ZeRO stage and layout are those of plain torch on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import Ranks
from tests.model.cases import relative_difference
from tests.tiny import tiny_config
from tests.training.cases import (
    REALLY_RELEASED,
    Outcome,
    assemble,
    evaluate,
    kept_by_a_forward_pass,
    run_engine,
    run_plainly,
)
from uoe_parallel.config.schema import ParallelConfig
from uoe_parallel.parallel.layout import supported_layouts, with_parallel


def is_slow(name: str, world: int) -> bool:
    """What fewer ranks, or a mix of the same axes, show as well."""
    if world == 8:
        return name != "tp2-sp-pp2-dp2-ep4-zero1"
    return name.startswith(("tp4-", "tp2-dp2-")) and name not in ("tp4-sp-zero1", "tp4-zero0")


LAYOUTS = [
    pytest.param(
        *(world, parallel),
        id=name,
        marks=[pytest.mark.slow] if is_slow(name, world) else [],
    )
    for world in (1, 2, 4, 8)
    for name, parallel in supported_layouts(tiny_config(), world).items()
]


@pytest.fixture(scope="module")
def plain(ranks: Ranks) -> Outcome:
    """What torch alone makes of the same steps."""
    return ranks(1).run(run_plainly, tiny_config())[0]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_steps_equal_plain_torch_on_one_rank(
    ranks: Ranks, plain: Outcome, world: int, parallel: ParallelConfig
) -> None:
    # One sequence each: one to four micro-batches a step.
    config = with_parallel(tiny_config(training={"micro_batch_size": 1}), parallel)
    outcomes = ranks(world).run(run_engine, config)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(plain.losses, rel=2e-5)
        assert outcome.gradient_norms == pytest.approx(plain.gradient_norms, rel=2e-5)
    worst, name = relative_difference(assemble(outcomes), assemble([plain]), eps=1e-3)
    assert worst < 2e-4, name


FORMS = [(1, {}), (2, {"pipeline": 2}), (2, {"expert": 2}), (2, {"tensor": 2})]
FORMS += [(4, {"tensor": 2, "pipeline": 2}), (4, {"tensor": 2, "expert": 4, "zero_stage": 2})]


@pytest.mark.parametrize(("world", "parallel"), FORMS)
def test_evaluation_and_logits_are_those_of_one_rank(
    ranks: Ranks, world: int, parallel: dict[str, int]
) -> None:
    [(expected, expected_logits)] = ranks(1).run(evaluate, tiny_config())
    found = ranks(world).run(evaluate, tiny_config(parallel=parallel))
    for evaluation, logits in found:
        assert evaluation.loss == pytest.approx(expected.loss, rel=1e-6)
        assert evaluation.accuracy == expected.accuracy
        assert logits is not None and found[0][1] is not None
        torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits, found[0][1]), "ranks draw tokens from these"


BF16 = [(2, {"zero_stage": stage}) for stage in range(4)]
BF16 += [(2, {"pipeline": 2, "zero_stage": stage}) for stage in (0, 1)]
BF16 += [(2, {"expert": 2, "zero_stage": stage}) for stage in (0, 1, 2)]
BF16 += [(4, {"tensor": 2, "expert": 4, "zero_stage": 1}), (2, {"tensor": 2, "zero_stage": 1})]


@pytest.mark.parametrize(("world", "parallel"), BF16)
def test_bf16_follows_fp32_and_keeps_fp32_masters(
    ranks: Ranks, world: int, parallel: dict[str, int]
) -> None:
    # Everything on, so that no near-tie of scores can send a token elsewhere.
    every: dict[str, Any] = {"feed_forward": {"top_k": 8}, "attention": {"top_k": 4}}
    expected = ranks(1).run(run_plainly, tiny_config(**every))[0]
    config = tiny_config(
        **every, parallel=parallel, training={"precision": "bf16", "micro_batch_size": 1}
    )
    outcomes = ranks(world).run(run_engine, config)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=0.02)
        assert outcome.gradient_norms == pytest.approx(expected.gradient_norms, rel=0.05)
    full = assemble(outcomes)
    masters = {key: t for key, t in full.items() if key.endswith("/master")}
    assert len(masters) * 4 == len(full)
    assert any((t != t.bfloat16()).any() for t in masters.values()), "masters must be fp32"


@pytest.mark.parametrize(("world", "parallel"), BF16)
def test_bf16_masters_begin_as_the_weights(
    ranks: Ranks, world: int, parallel: dict[str, int]
) -> None:
    config = tiny_config(parallel=parallel, training={"precision": "bf16", "micro_batch_size": 1})
    full = assemble(ranks(world).run(run_engine, config, steps=0))
    names = {key.removesuffix("/master") for key in full if key.endswith("/master")}
    assert len(names) * 4 == len(full)
    for name in names:
        assert torch.equal(full[f"{name}/master"], full[f"{name}/weight"]), name
        assert not full[f"{name}/exp_avg"].any()


@pytest.mark.parametrize(("world", "tensor"), [(2, 1), (4, 2)])
def test_zero3_that_releases_every_parameter_equals_plain_torch(
    ranks: Ranks, plain: Outcome, world: int, tensor: int
) -> None:
    config = tiny_config(
        parallel={"tensor": tensor, "zero_stage": 3},
        training={"micro_batch_size": 1},
        deepspeed=REALLY_RELEASED,
    )
    outcomes = ranks(world).run(run_engine, config)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(plain.losses, rel=2e-5)
        assert outcome.gradient_norms == pytest.approx(plain.gradient_norms, rel=2e-5)
    worst, name = relative_difference(assemble(outcomes), assemble([plain]), eps=1e-3)
    assert worst < 2e-4, name


def test_zero3_forward_pass_keeps_no_expert_weight(ranks: Ranks) -> None:
    config = tiny_config(parallel={"zero_stage": 3}, deepspeed=REALLY_RELEASED)
    for expert_weights, gathered, kept in ranks(2).run(kept_by_a_forward_pass, config):
        assert len(gathered) == expert_weights, "each must have been seen while it was gathered"
        assert kept == set()
