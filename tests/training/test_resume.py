"""A run that was interrupted goes on as if it had not been, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.harness import Ranks
from tests.programs import call_program, metrics, only_complaint, write_run
from tests.training.runs import config_of, live, tensors_of
from uoe_parallel.config.load import load_config

LAYOUTS: list[tuple[str, int, dict[str, int], int]] = [
    *(("fp32", 4, {"tensor": 2}, stage) for stage in range(4)),
    *(("bf16", 2, {}, stage) for stage in range(4)),
    *((precision, 2, {"pipeline": 2}, stage) for precision in ("fp32", "bf16") for stage in (0, 1)),
    *(("fp32", 2, {"expert": 2}, stage) for stage in (0, 2)),
    *(("bf16", 2, {"expert": 2}, stage) for stage in (0, 1, 2)),
    ("fp32", 4, {"pipeline": 2, "expert": 2}, 1),
    ("bf16", 4, {"tensor": 2, "expert": 4}, 1),
]
FAST = [
    ("bf16", 2, {}, 0),
    ("bf16", 2, {}, 2),
    ("fp32", 2, {"pipeline": 2}, 0),
    ("bf16", 2, {"pipeline": 2}, 1),
    ("fp32", 2, {"expert": 2}, 2),
    ("fp32", 4, {"tensor": 2}, 3),
]
"""Each optimizer state that is kept otherwise, once."""


@pytest.mark.parametrize(
    ("precision", "world_size", "axes", "zero_stage"),
    [
        pytest.param(*layout, marks=[] if layout in FAST else [pytest.mark.slow])
        for layout in LAYOUTS
    ],
)
def test_resumed_run_equals_the_run_that_never_stopped(
    ranks: Ranks,
    tmp_path: Path,
    precision: str,
    world_size: int,
    axes: dict[str, int],
    zero_stage: int,
) -> None:
    steps = 6
    dropout = 0.2 if precision == "fp32" else 0.0
    model = {"dropout": dropout, "attention_dropout": dropout}
    sections = {
        "model": {"num_layers": axes.get("pipeline", 1), "sequence_length": 8, **model},
        "parallel": {**axes, "zero_stage": zero_stage},
        "feed_forward": {
            "selection": "threshold",
            "threshold_warmup": 2,
            "segment_length": 4,
            "segment_experts": 6,
        },
        "attention": {"balance": ["bias"]},
        "training": {
            "steps": steps,
            "precision": precision,
            "warmup_steps": 2,
            "recompute": "selective" if precision == "fp32" else "none",
        },
    }
    straight = config_of(tmp_path / "straight", **sections)
    broken = config_of(
        tmp_path / "broken", **sections, checkpoint={"every": 3, "asynchronous": True}
    )
    assert not straight.checkpoint.every, "saving may not change anything either"
    expected = ranks(world_size).run(live, straight)
    before = ranks(world_size).run(live, broken, crash_after=4)
    after = ranks(world_size).run(live, broken)

    for whole, first, rest in zip(expected, before, after, strict=True):
        assert list(whole.steps) == [1, 2, 3, 4, 5, 6]
        assert (list(first.steps), list(rest.steps)) == ([1, 2, 3, 4], [4, 5, 6])
        assert {**first.steps, **rest.steps} == whole.steps
        assert rest.validation == whole.validation
    assert len({life.steps[6].random for life in after}) == world_size
    tensors, resumed = (tensors_of(Path(c.run_dir), steps) for c in (straight, broken))
    assert tensors.keys() == resumed.keys()
    assert any(key.endswith("/master") for key in tensors) == (precision == "bf16")
    learned = {"Threshold/threshold", "Threshold/spread", "Threshold/steps", "LoadBias/bias"}
    assert learned == {"/".join(key.split("/")[2:]) for key in tensors if "router/" in key}
    for key, tensor_before in tensors.items():
        assert tensor_before.dtype == resumed[key].dtype
        assert torch.equal(tensor_before, resumed[key]), key
        # A moment that is zero to the end was never given to anybody.
        assert not key.endswith(("/exp_avg", "/exp_avg_sq")) or tensor_before.any(), key
    # Step 4 was taken twice and is recorded once.
    assert [record["step"] for record in metrics(Path(broken.run_dir))] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in metrics(Path(broken.run_dir))] == [
        step.loss for step in expected[0].steps.values()
    ]


def test_every_step_has_data_of_its_own(ranks: Ranks, tmp_path: Path) -> None:
    """Weights that do not move show another loss on other data only."""
    config = config_of(tmp_path, training={"steps": 3, "learning_rate": 1e-30, "weight_decay": 0.0})
    [life] = ranks(1).run(live, config)
    assert len({step.loss for step in life.steps.values()}) == 3


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The YAML of a finished run at tensor parallel 2, with checkpoints of steps 1 and 2, and its
    validation loss. Tests must not write to its folder."""
    folder = tmp_path_factory.mktemp("saved")
    path = write_run(
        folder,
        parallel={"tensor": 2},
        training={"steps": 2},
        checkpoint={"every": 1, "keep": 2},
    )
    life, _ = ranks(2).run(live, load_config(path))
    assert life.validation is not None
    return path, life.validation


def _copy(saved: tuple[Path, float], target: Path) -> str:
    """The override that names a copy of the saved run's folder."""
    shutil.copytree(saved[0].parent / "run", target)
    return f"run_dir={target}"


def test_no_whole_checkpoint_is_refused_instead_of_starting_over(
    ranks: Ranks, saved: tuple[Path, float], tmp_path: Path
) -> None:
    override = _copy(saved, tmp_path / "run")
    records = metrics(tmp_path / "run")
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-100])
    first, second = ranks(2).run(call_program, "--config", saved[0], override)

    assert (first.code, second.code, second.err) == (2, 2, "")
    *warnings, message = first.err.splitlines()
    for step, warning in zip((2, 1), warnings, strict=True):
        assert f"step-0000000{step}" in warning and f"step-0000000{step}" in message
    assert str(tmp_path / "run" / "checkpoints") in message
    assert metrics(tmp_path / "run") == records


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_size=48", ["model", "hidden_size", "32", "48"]),
        ("seed=8", ["seed", "7", "8"]),
        ("training.global_batch_size=8", ["training.global_batch_size", "4", "8"]),
        ("training.precision=bf16", ["training.precision", "fp32", "bf16"]),
        ("feed_forward.num_experts=4", ["feed_forward.num_experts", "8", "4"]),
        ("feed_forward.routed_layers=[0]", ["feed_forward.routed_layers", "all", "[0]"]),
        ("attention.routed_layers=none", ["attention.routed_layers", "all", "none"]),
        ("attention.shared_experts=1", ["attention.shared_experts", "0", "1"]),
        (
            "feed_forward.segment_length=4 feed_forward.segment_experts=4",
            ["levels of feed_forward", '["patches"]', '["segments", "patches"]'],
        ),
    ],
)
def test_other_run_is_refused_by_name(
    ranks: Ranks, saved: tuple[Path, float], tmp_path: Path, override: str, named: list[str]
) -> None:
    arguments = ("--config", saved[0], _copy(saved, tmp_path / "run"), *override.split())
    files = _files(tmp_path)
    message = only_complaint(ranks(2).run(call_program, *arguments, "training.steps=4"))

    for word in ("step-00000002", "run_dir", *named):
        assert word in message
    assert _files(tmp_path) == files


def test_data_of_another_size_is_refused_by_name(
    ranks: Ranks, saved: tuple[Path, float], tmp_path: Path
) -> None:
    override = _copy(saved, tmp_path / "run")
    other = f"data.train={saved[0].parent / 'validation'}"
    message = only_complaint(ranks(2).run(call_program, "--config", saved[0], override, other))
    for word in ("data.train", "saved [2000, ", "now [200, "):
        assert word in message


def test_data_that_moved_is_taken(ranks: Ranks, saved: tuple[Path, float], tmp_path: Path) -> None:
    for file in saved[0].parent.glob("train.*"):
        shutil.copy(file, tmp_path)
    overrides = [_copy(saved, tmp_path / "run"), f"data.train={tmp_path / 'train'}"]
    life, _ = ranks(2).run(live, load_config(saved[0], [*overrides, "training.steps=3"]))
    assert list(life.steps) == [3]


def test_dropout_and_recomputation_may_change(
    ranks: Ranks, saved: tuple[Path, float], tmp_path: Path
) -> None:
    changes = ["model.dropout=0.1", "model.attention_dropout=0.1", "training.recompute=full"]
    overrides = [_copy(saved, tmp_path / "run"), *changes, "training.steps=3"]
    life, _ = ranks(2).run(live, load_config(saved[0], overrides))
    assert list(life.steps) == [3]


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
