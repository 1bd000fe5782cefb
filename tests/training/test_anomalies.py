"""A step that must not be taken moves nothing, and what follows is as configured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness import Ranks
from tests.programs import metrics, write_run
from uoe_parallel.checkpoint import CheckpointReader, find_checkpoint
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import AnomaliesConfig, RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.model.running_rules import rule_states
from uoe_parallel.parallel.groups import distributed, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.training.anomalies import Anomaly, Guard
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.engine import StepResult
from uoe_parallel.training.progress import Progress
from uoe_parallel.training.state import base_optimizer
from uoe_parallel.training.trainer import Trainer

Plan = Mapping[int, Literal["loss", "gradient", "reduced gradient", "activation", "spike"]]
"""What goes wrong on the last rank, by the number of the global batch, from 0."""


class Life(NamedTuple):
    """What a rank saw of a run, or of its part after a resume."""

    steps: list[tuple[int, float, float]]
    """Steps that are behind, loss and gradient norm after each try, in the order of time."""
    kept: list[bool]
    """After each try that did not succeed: whether all states had their bits."""
    progress: Progress
    error: str | None


class _Crash(Exception):
    """The end of the program in the middle of the loop."""


def _config(folder: Path, **sections: Any) -> RunConfig:
    small = {"num_layers": sections.get("parallel", {}).get("pipeline", 1), "sequence_length": 8}
    learning = {"selection": "threshold", "threshold_warmup": 1}
    nothing_else = {"validation": None, "test": None}
    sections = {"model": small, "feed_forward": learning, "data": nothing_else} | sections
    return load_config(write_run(folder, attention={"balance": ["bias"]}, **sections))


def _live(
    config: RunConfig, plan: Plan, crash_after: int | None = None, batches_behind: int = 0
) -> Life:
    """On every rank: train. crash_after: tries. batches_behind: passed over at the beginning."""
    with distributed() as device:
        groups = start_groups(ParallelLayout.from_config(config.parallel, dist.get_world_size()))
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        steps: list[tuple[int, float, float]] = []
        kept: list[bool] = []
        take, error = trainer.engine.step, None
        restore = trainer._restore

        def restored(reader: CheckpointReader) -> None:
            restore(reader)
            trainer.progress.batch += batches_behind

        def watched(*arguments: Any) -> StepResult:
            fault = plan.get(trainer.progress.batch)
            before = _bits(trainer)
            with _planted(trainer, fault if groups.rank == groups.world.size() - 1 else None):
                result = take(*arguments)
            steps.append((trainer.step + 1, result.loss, result.gradient_norm))
            assert (result.anomaly is None) == (fault is None), result
            if fault is not None:
                assert not any(
                    rule.observed.any()
                    for block in trainer.model.routed_blocks().values()
                    for rule in block.router.running
                )
                kept.append(_equal(before, _bits(trainer)))
            else:
                assert not _equal(before, _bits(trainer))
            if len(steps) == crash_after:
                raise _Crash
            return result

        with (
            mock.patch.object(trainer.engine, "step", watched),
            mock.patch.object(trainer, "_restore", restored),
        ):
            try:
                trainer.train()
            except (UserError, _Crash) as end:
                error = str(end)
        return Life(steps, kept, trainer.progress, error)


@contextmanager
def _planted(trainer: Trainer, fault: str | None) -> Iterator[None]:
    """A step in which a number on this rank is not what it should be."""
    clipper = trainer.engine.clipper
    measure: Callable[[Tensor], tuple[list[float], float]] = clipper.measure
    # Whole on tensor ranks, of which this is not the one that counts it in the norm.
    norm = next(m for n, m in trainer.model.named_modules() if n.endswith("norm"))
    factor = {"loss": math.nan, "spike": 100.0}.get(fault or "", 1.0)
    hook = None

    def measured(sums_K: Tensor) -> tuple[list[float], float]:
        if fault == "reduced gradient":
            for gradient, _ in clipper._gradients():
                gradient.fill_(math.nan)
        return measure(sums_K * factor)

    if fault == "gradient":
        hook = norm.get_parameter("weight").register_hook(lambda g: g * math.inf)
    elif fault == "activation":
        hook = norm.register_forward_hook(lambda _, __, y: y * math.nan)
    with mock.patch.object(clipper, "measure", measured):
        yield
    if hook is not None:
        hook.remove()


def _bits(trainer: Trainer) -> list[Tensor]:
    """Weights, masters, moments, AdamW's counts and the state of routing rules, as they are."""
    held = [getattr(p, "ds_tensor", p).detach() for p in trainer.model.parameters()]
    for stepped, state in base_optimizer(trainer.engine.deepspeed).state.items():
        held += [stepped.detach(), *state.values()]
    held += [state for _, state in rule_states(trainer.model.routed_blocks())]
    return [tensor.clone() for tensor in held]


def _equal(before: list[Tensor], after: list[Tensor]) -> bool:
    assert len(before) == len(after) > 0
    return all(map(torch.equal, before, after))


def _state(run_dir: str, step: int) -> tuple[dict[str, Tensor], Any]:
    """Everything in the newest checkpoint, which is of `step`."""
    reader = find_checkpoint(Path(run_dir) / "checkpoints", None)
    assert reader is not None and reader.step == step
    keys = reader.keys()
    return {key: reader.read(key) for key in keys}, reader.state


LAYOUTS: list[tuple[str, int, dict[str, int], int]] = [
    *((precision, 2, {}, stage) for precision in ("fp32", "bf16") for stage in range(4)),
    *((precision, 2, {"pipeline": 2}, stage) for precision in ("fp32", "bf16") for stage in (0, 1)),
    *(("fp32", 2, {"tensor": 2}, stage) for stage in (0, 1, 3)),
    *(("bf16", 2, {"tensor": 2}, stage) for stage in (0, 2)),
    *(("bf16", 2, {"expert": 2}, stage) for stage in (0, 1, 2)),
    ("fp32", 4, {"tensor": 2, "pipeline": 2}, 1),
]
FAST = [
    ("fp32", 2, {}, 2),
    ("fp32", 2, {}, 3),
    ("fp32", 2, {"tensor": 2}, 0),
    ("bf16", 2, {"tensor": 2}, 0),
    ("bf16", 2, {"pipeline": 2}, 1),
    ("bf16", 2, {}, 1),
]
"""Each of DeepSpeed's optimizers and own checks, once."""


@pytest.mark.parametrize(
    ("precision", "world_size", "axes", "zero_stage"),
    [
        pytest.param(*layout, marks=[] if layout in FAST else [pytest.mark.slow])
        for layout in LAYOUTS
    ],
)
def test_skipped_step_moves_nothing(
    ranks: Ranks,
    tmp_path: Path,
    precision: str,
    world_size: int,
    axes: dict[str, int],
    zero_stage: int,
) -> None:
    config = _config(
        tmp_path,
        parallel={**axes, "zero_stage": zero_stage},
        training={"steps": 5, "precision": precision},
        anomalies={"not_finite": "skip", "limit": 4},
    )
    plan: Plan = {1: "gradient", 2: "activation", 3: "reduced gradient"}
    lives = ranks(world_size).run(_live, config, plan)
    for life in lives:
        assert life.error is None and life.kept == [True, True, True]
        assert life.progress == Progress(step=5, batch=5, updates=2)
        assert str(life.steps) == str(lives[0].steps), "where NaN is equal to itself"
    assert not any(math.isfinite(norm) for _, _, norm in lives[0].steps[1:4])
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 5]
    assert not any(value is None for record in records for value in record.values())
    gradient, activation, _ = metrics(tmp_path / "run", "event")
    assert (gradient["step"], gradient["gradient_norm"], gradient["done"]) == (2, None, "skip")
    assert gradient["loss"] == lives[0].steps[1][1] and "gradient norm" in gradient["what"]
    # Routing may send a token without a score nowhere, and then the loss is a number.
    assert (activation["step"], activation["gradient_norm"]) == (3, None)
    assert "of step 3 is nan (anomaly 2 in a row)" in activation["what"]


@pytest.mark.slow
def test_skipped_step_of_an_offloaded_optimizer(ranks: Ranks, tmp_path: Path) -> None:
    """Under ZeRO 3 alone, where DeepSpeed keeps its gradients elsewhere."""
    sections: dict[str, Any] = {"parallel": {"zero_stage": 3}, "training": {"steps": 4}}
    offloaded = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    config = _config(tmp_path, **sections, anomalies={"not_finite": "skip"}, deepspeed=offloaded)
    plain = _config(tmp_path / "plain", **sections, anomalies={"not_finite": "skip"})
    plan: Plan = {1: "gradient", 2: "reduced gradient"}
    lives, expected = (ranks(2).run(_live, c, plan) for c in (config, plain))
    for life, other in zip(lives, expected, strict=True):
        assert life.error is None and life.kept == [True, True]
        for (_, *values), (_, *others) in zip(life.steps, other.steps, strict=True):
            assert values == pytest.approx(others, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_run_of_stages_that_stops_leaves_the_weights(
    ranks: Ranks, tmp_path: Path, fault: str
) -> None:
    config = _config(tmp_path, parallel={"pipeline": 2, "zero_stage": 0})
    for life in ranks(2).run(_live, config, {1: fault}):
        assert life.kept == [True] and life.progress == Progress(step=1, batch=1, updates=1)
        assert life.error is not None and "of step 2 is" in life.error
    [event] = metrics(tmp_path / "run", "event")
    assert event["done"] == "stop"


def test_run_resumed_after_a_skip_judges_on(ranks: Ranks, tmp_path: Path) -> None:
    """The spike after the resume stands out from steps that were taken before it."""
    sections: dict[str, Any] = {
        "training": {"steps": 7, "learning_rate": 1e-5},
        "anomalies": {
            "not_finite": "skip",
            "spike": "skip",
            "spike_window": 6,
            "spike_sigmas": 1e3,
        },
    }
    plan: Plan = {1: "loss", 2: "gradient", 5: "spike"}
    straight = _config(tmp_path / "straight", **sections)
    broken = _config(tmp_path / "broken", **sections, checkpoint={"every": 4})
    [expected] = ranks(1).run(_live, straight, plan)
    ranks(1).run(_live, broken, plan, crash_after=5)
    [rest] = ranks(1).run(_live, broken, plan)

    assert expected.error is None and len(rest.steps) == 3
    assert rest.steps == expected.steps[4:] and rest.progress == expected.progress
    (tensors, state), (resumed, its_state) = _state(straight.run_dir, 7), _state(broken.run_dir, 7)
    assert state["guard"] == its_state["guard"] and len(state["guard"]["losses"]) == 4
    assert tensors.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("aside", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_roll_back_passes_over_the_data_since_the_checkpoint(
    ranks: Ranks, tmp_path: Path, aside: bool
) -> None:
    sections: dict[str, Any] = {
        "training": {"steps": 6},
        "anomalies": {"not_finite": "roll_back"},
        "checkpoint": {"every": 3, "keep": 2, "asynchronous": aside},
    }
    config = _config(tmp_path, **sections, parallel={"zero_stage": 1})
    lives = ranks(2).run(_live, config, {4: "gradient"})
    run, reference = tmp_path / "run", tmp_path / "reference"
    shutil.copytree(run / "checkpoints" / "step-00000003", reference / "checkpoints/step-00000003")
    never_drew = config.model_copy(update={"run_dir": str(reference)})
    expected = ranks(2).run(_live, never_drew, {}, batches_behind=2)

    for life, other in zip(lives, expected, strict=True):
        assert life.error is None and life.kept == [True]
        assert [step for step, *_ in life.steps] == [1, 2, 3, 4, 5, 4, 5, 6]
        assert life.steps[5:] == other.steps and life.steps[3] != life.steps[5]
        assert life.progress == other.progress == Progress(step=6, batch=8, updates=6)
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]
    [event] = metrics(run, "event")
    assert (event["step"], event["done"]) == (5, "roll_back")
    tensors, resumed = _state(config.run_dir, 6)[0], _state(never_drew.run_dir, 6)[0]
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in tensors.items())


def test_anomaly_that_comes_again_stops_the_run(ranks: Ranks, tmp_path: Path) -> None:
    config = _config(
        tmp_path,
        training={"steps": 9},
        anomalies={"not_finite": "roll_back", "limit": 2},
        checkpoint={"every": 2},
    )
    # The second comes after a step that was taken again, which got no further.
    [life] = ranks(1).run(_live, config, {2: "loss", 4: "loss"})
    assert [step for step, *_ in life.steps] == [1, 2, 3, 3, 4]
    assert life.error is not None and "step 4 is nan (anomaly 2 in a row)" in life.error
    assert [event["done"] for event in metrics(tmp_path / "run", "event")] == ["roll_back", "stop"]


def test_roll_back_without_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    config = _config(tmp_path, anomalies={"not_finite": "roll_back"}, checkpoint={"every": 3})
    [life] = ranks(1).run(_live, config, {1: "loss"})
    assert life.error is not None and life.kept == [True]
    for word in ("loss of step 2 is nan", "no checkpoint to go back to", "checkpoint.every"):
        assert word in life.error


def _judged(guard: Guard, *values: tuple[float, float]) -> list[Anomaly | None]:
    return [guard.judge(step, *value) for step, value in enumerate(values)]


def _history(count: int) -> list[tuple[float, float]]:
    """Losses around 2, norms around 1, with a standard deviation of about 0.1."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    return [(2 + a, 1 + b) for a, b in noise.tolist()]


@pytest.mark.parametrize(
    ("value", "name"), [((2.9, 1.0), "loss"), ((2.0, 1.9), "gradient norm"), ((1.0, 0.1), None)]
)
def test_spikes_stand_out_upwards(value: tuple[float, float], name: str | None) -> None:
    guard = Guard(AnomaliesConfig(spike="skip", spike_window=64))
    *before, last = _judged(guard, *_history(100), value)
    assert not any(before)
    assert (last is None) == (name is None)
    if last is not None and name is not None:
        assert last.action == "skip" and f"the {name} of step 101" in last.what


def test_spikes_are_seen_from_half_a_window_on() -> None:
    config = AnomaliesConfig(spike="skip", spike_window=64)
    assert _judged(Guard(config), *_history(31), (9.0, 1.0))[-1] is None
    assert _judged(Guard(config), *_history(32), (9.0, 1.0))[-1] is not None
    ignoring = Guard(AnomaliesConfig(spike_window=64))
    assert _judged(ignoring, *_history(32), (9.0, 1.0))[-1] is None


def test_what_was_skipped_does_not_enter_the_window() -> None:
    guard = Guard(AnomaliesConfig(spike="skip", spike_window=64, limit=9))
    anomalies = _judged(guard, *_history(64), *[(9.0, 1.0)] * 5, *_history(4))
    assert [anomaly is not None for anomaly in anomalies[64:]] == [True] * 5 + [False] * 4


def test_steps_that_were_taken_again_do_not_end_the_row() -> None:
    guard = Guard(AnomaliesConfig(not_finite="roll_back", limit=3))
    bad, good = (math.nan, 1.0), (2.0, 1.0)
    actions = [
        anomaly and anomaly.action
        for step, value in ((5, bad), (4, good), (5, good), (4, bad), (6, good), (7, bad))
        for anomaly in [guard.judge(step, *value)]
    ]
    assert actions == ["roll_back", None, None, "roll_back", None, "roll_back"]
    assert guard.judge(7, *bad) == Anomaly(
        "the loss of step 8 is nan (anomaly 2 in a row)", "roll_back"
    )
    last = guard.judge(6, math.inf, 1.0)
    assert last is not None and last.action == "stop"


def test_guard_that_goes_back_keeps_its_count() -> None:
    config = AnomaliesConfig(not_finite="skip", spike="skip", spike_window=4, limit=5)
    guard, fresh = Guard(config), Guard(config)
    _judged(guard, *_history(3))
    state = guard.as_state()
    guard.judge(3, math.nan, 1.0)
    later = guard.as_state()
    guard.restore(state)
    assert guard.as_state() == state | {"in_a_row": 1, "furthest": 3}
    fresh.restore(later)
    assert fresh.as_state() == later and torch.equal(fresh.as_tensor(), guard.as_tensor())
