"""Training routers alone: nothing else moves, has a gradient or a state, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.analysis.cases import take_steps
from tests.harness import Ranks
from tests.model.cases import relative_difference
from tests.programs import call_program, only_complaint, write_run
from tests.tiny import tiny_config, write_corpus
from tests.training.cases import REALLY_RELEASED, Outcome, assemble, run_engine, run_plainly
from tests.training.runs import config_of, live, tensors_of
from uoe_parallel.analysis.simulate import simulate_world

ALONE: dict[str, Any] = {"trains": "routers", "micro_batch_size": 1}
BF16: dict[str, Any] = ALONE | {"precision": "bf16"}
ROUTERS = {
    f"layers.{n}.{kind}.router_weight" for n in (0, 1) for kind in ("attention", "feed_forward")
}


@pytest.fixture(scope="module")
def plain(ranks: Ranks) -> Outcome:
    """What torch alone makes of the same steps."""
    return ranks(1).run(run_plainly, tiny_config(training=ALONE))[0]


LAYOUTS = [
    pytest.param(world, parallel, training, id=name, marks=[pytest.mark.slow] if slow else [])
    for name, world, parallel, training, slow in (
        ("dp2-zero0", 2, {"zero_stage": 0}, ALONE, True),
        ("dp2-zero1", 2, {"zero_stage": 1}, ALONE, True),
        ("dp2-zero2", 2, {"zero_stage": 2}, ALONE, True),
        ("dp2-zero3", 2, {"zero_stage": 3}, ALONE, False),
        ("tp2-zero1-recomputed", 2, {"tensor": 2}, ALONE | {"recompute": "full"}, False),
        ("tp2-zero0", 2, {"tensor": 2, "sequence_parallel": False, "zero_stage": 0}, ALONE, True),
        ("pp2-zero0", 2, {"pipeline": 2, "zero_stage": 0}, ALONE, True),
        ("dp2-ep2-zero2", 2, {"expert": 2, "zero_stage": 2}, ALONE, False),
        ("tp2-pp2-zero1", 4, {"tensor": 2, "pipeline": 2}, ALONE, True),
        ("bf16-dp2-zero0", 2, {"zero_stage": 0}, BF16, True),
        ("bf16-dp2-zero2", 2, {"zero_stage": 2}, BF16, True),
        ("bf16-dp2-zero3", 2, {"zero_stage": 3}, BF16, True),
        ("bf16-pp2-zero1", 2, {"pipeline": 2}, BF16, False),
    )
]


@pytest.mark.parametrize(("world", "parallel", "training"), LAYOUTS)
def test_routers_move_as_in_plain_torch_and_nothing_else_does(
    ranks: Ranks, plain: Outcome, world: int, parallel: dict[str, Any], training: dict[str, Any]
) -> None:
    config = tiny_config(parallel=parallel, training=training, deepspeed=REALLY_RELEASED)
    before = assemble(ranks(world).run(run_engine, config, steps=0))
    outcomes = ranks(world).run(run_engine, config)
    after = assemble(outcomes)

    is_fp32 = config.training.precision == "fp32"
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(plain.losses, rel=2e-5 if is_fp32 else 0.02)
    for key, tensor in after.items():
        name, kind = key.rsplit("/", 1)
        assert name in ROUTERS or kind == "weight", key
        assert torch.equal(tensor, before[key]) == (name not in ROUTERS), key
    assert {key.rsplit("/", 1)[0] for key in after if key.endswith("/exp_avg")} == ROUTERS
    if is_fp32:
        worst, name = relative_difference(after, assemble([plain]), eps=1e-3)
        assert worst < 2e-4, name


@pytest.mark.parametrize(
    ("precision", "parallel"),
    [
        ("fp32", {"zero_stage": 2}),
        pytest.param("bf16", {"zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param("bf16", {"pipeline": 2}, marks=pytest.mark.slow),
    ],
)
def test_run_resumes_exactly(
    ranks: Ranks, tmp_path: Path, precision: str, parallel: dict[str, int]
) -> None:
    sections: dict[str, Any] = {
        "parallel": parallel,
        "training": {"trains": "routers", "steps": 4, "precision": precision},
        "checkpoint": {"every": 2},
        "replicas": {"check_every": 1},
    }
    straight = config_of(tmp_path / "straight", **sections)
    broken = config_of(tmp_path / "broken", **sections)
    expected = ranks(2).run(live, straight)
    ranks(2).run(live, broken, crash_after=3)
    resumed = ranks(2).run(live, broken)
    for whole, rest in zip(expected, resumed, strict=True):
        assert rest.steps == {step: whole.steps[step] for step in (3, 4)}
    tensors, again = (tensors_of(Path(config.run_dir), 4) for config in (straight, broken))
    assert tensors.keys() == again.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, again[key]), key


@pytest.mark.parametrize(
    ("world", "parallel", "training"),
    [
        (2, {"zero_stage": 1}, ALONE),
        pytest.param(1, {"zero_stage": 0}, ALONE, marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 2}, ALONE, marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 3}, ALONE, marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 1}, BF16, marks=pytest.mark.slow),
    ],
)
def test_states_are_those_that_were_computed(
    ranks: Ranks, tmp_path: Path, world: int, parallel: dict[str, int], training: dict[str, Any]
) -> None:
    config = tiny_config(
        run_dir=str(tmp_path / "run"),
        data={"train": str(write_corpus(tmp_path / "corpus"))},
        parallel=parallel,
        training=training,
    )
    for rank, step in enumerate(ranks(world).run(take_steps, config)):
        states = simulate_world(config, world, rank).states
        assert states.weights == step.weights
        assert set(step.gradients) <= {states.gradients}
        assert states.optimizer == step.optimizer


def test_stage_without_a_router_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        training={"trains": "routers"},
        feed_forward={"routed_layers": [0]},
        attention={"routed_layers": "none"},
        parallel={"pipeline": 2},
    )
    message = only_complaint(ranks(2).run(call_program, "--config", path))
    assert "pipeline stage 1" in message and "training.trains" in message
