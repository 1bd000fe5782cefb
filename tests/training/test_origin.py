"""A run that begins with the weights and rules of another run's checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import Ranks
from tests.programs import call_program, only_complaint, write_run
from tests.training.runs import config_of, live, tensors_of
from uoe_parallel.checkpoint.manifest import MANIFEST_NAME, seal, unseal
from uoe_parallel.config.load import load_config

STANDING: dict[str, Any] = {"steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
"""Training that moves no bit of a weight."""
THRESHOLD = {"selection": "threshold", "threshold_warmup": 1}


@pytest.fixture(scope="module")
def source(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("source")
    config = config_of(folder, feed_forward=THRESHOLD, training={"steps": 2})
    ranks(1).run(live, config)
    return Path(config.run_dir)


LAYOUTS = [
    pytest.param(2, {"tensor": 2}, "fp32", id="tp2-zero1", marks=pytest.mark.slow),
    pytest.param(2, {"zero_stage": 3}, "fp32", id="dp2-zero3"),
    pytest.param(
        2, {"pipeline": 2, "zero_stage": 0}, "fp32", id="pp2-zero0", marks=pytest.mark.slow
    ),
    pytest.param(2, {"expert": 2, "zero_stage": 2}, "bf16", id="dp2-ep2-zero2-bf16"),
]


@pytest.mark.parametrize(("world", "parallel", "precision"), LAYOUTS)
def test_weights_and_rules_are_those_of_the_checkpoint(
    ranks: Ranks,
    source: Path,
    tmp_path: Path,
    world: int,
    parallel: dict[str, int],
    precision: str,
) -> None:
    config = config_of(
        tmp_path,
        seed=8,
        model={"sequence_length": 8, "dropout": 0.1},
        feed_forward=THRESHOLD,
        parallel=parallel,
        training=STANDING | {"precision": precision},
        checkpoint={"start_from": str(source)},
    )
    ranks(world).run(live, config)
    before, after = tensors_of(source, 2), tensors_of(Path(config.run_dir), 1)
    kind = "weight" if precision == "fp32" else "master"
    for key, weight in before.items():
        if key.endswith("/weight"):
            assert torch.equal(after[key.replace("/weight", f"/{kind}")], weight), key
    steps = [key for key in before if key.endswith("Threshold/steps")]
    assert len(steps) == 2
    assert [after[key] - before[key] for key in steps] == [1, 1]


def test_routers_that_a_dense_checkpoint_lacks_begin_anew(ranks: Ranks, tmp_path: Path) -> None:
    dense = {kind: {"routed_layers": "none"} for kind in ("feed_forward", "attention")}
    donor = config_of(tmp_path / "donor", training={"steps": 2}, **dense)
    ranks(1).run(live, donor)
    path = write_run(tmp_path / "target", training=STANDING)
    begin = [f"checkpoint.start_from={donor.run_dir}/checkpoints/step-00000002"]
    [outcome] = ranks(1).run(call_program, "--config", path, *begin)
    assert outcome.code == 0, outcome.err
    assert "step-00000002; 4 routers that it does not have begin anew" in outcome.out
    fresh = config_of(tmp_path / "fresh", training=STANDING)
    ranks(1).run(live, fresh)

    weights, donated, new = (
        {key: t for key, t in tensors_of(folder, step).items() if key.endswith("/weight")}
        for folder, step in (
            (tmp_path / "target" / "run", 1),
            (Path(donor.run_dir), 2),
            (Path(fresh.run_dir), 1),
        )
    )
    assert len(weights) == len(new) == len(donated) + 4
    for key, weight in weights.items():
        assert torch.equal(weight, donated.get(key, new[key])), key


def test_run_with_a_checkpoint_of_its_own_continues_from_that(
    ranks: Ranks, source: Path, tmp_path: Path
) -> None:
    path = write_run(tmp_path, feed_forward=THRESHOLD, training=STANDING)
    begin = [f"checkpoint.start_from={source}"]
    ranks(1).run(live, load_config(path, begin))
    [life] = ranks(1).run(
        live, load_config(path, ["checkpoint.start_from=gone", "training.steps=2"])
    )
    assert list(life.steps) == [2]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["model.num_layers=1", "model.activation=gelu", "feed_forward.num_experts=4"],
            ["model.num_layers: saved 2, now 1", 'saved "swiglu", now "gelu"', "saved 8, now 4"],
        ),
        (
            ["model.num_kv_heads=8", "feed_forward.shared_experts=1"],
            ["layers.0.attention.experts.qkv.weight", "[64, 32]", "[96, 32]", "[7, 32]"],
        ),
    ],
)
def test_checkpoint_of_another_model_is_refused_by_name(
    ranks: Ranks, source: Path, tmp_path: Path, overrides: list[str], named: list[str]
) -> None:
    path = write_run(tmp_path, feed_forward=THRESHOLD, checkpoint={"start_from": str(source)})
    message = only_complaint(ranks(2).run(call_program, "--config", path, *overrides))
    for word in ("checkpoint.start_from", "step-00000002", *named):
        assert word in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_missing_checkpoint_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, checkpoint={"start_from": str(tmp_path / "gone")})
    message = only_complaint(ranks(2).run(call_program, "--config", path))
    assert "gone" in message and "holds no whole checkpoint" in message


def test_checkpoint_of_another_tokenizer_is_refused(
    ranks: Ranks, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source / "checkpoints", tmp_path / "checkpoints")
    [folder] = (tmp_path / "checkpoints").iterdir()
    manifest = unseal((folder / MANIFEST_NAME).read_text())
    told = manifest.model_copy(update={"state": manifest.state | {"tokenizer": "another"}})
    (folder / MANIFEST_NAME).write_text(seal(told.model_dump()))
    path = write_run(tmp_path, checkpoint={"start_from": str(tmp_path / "checkpoints")})
    message = only_complaint(ranks(2).run(call_program, "--config", path))
    assert "data.tokenizer" in message and "another" in message
