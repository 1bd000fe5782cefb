"""What is read from run folders is what training did."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import Ranks
from tests.programs import write_run
from tests.tiny import tiny_config
from tests.verification.cases import Step, gradients_seen, parameter_names, write_record
from uoe_parallel.config.load import load_config
from uoe_parallel.errors import UserError
from uoe_parallel.verification.record import RunRecord, depth


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"tie_embeddings": False, "bias": False, "num_layers": 12}},
        {"feed_forward": {"routed_layers": [1]}, "attention": {"routed_layers": "none"}},
    ],
)
def test_names_are_ordered_as_the_model_has_them(ranks: Ranks, sections: dict[str, Any]) -> None:
    [names] = ranks(1).run(parameter_names, tiny_config(**sections))
    shuffled = sorted(names, key=lambda name: random.Random(name).random())
    assert shuffled != names
    assert sorted(shuffled, key=depth) == names


@pytest.mark.parametrize("clipping", [0.0, 0.1], ids=["no clipping", "clipping"])
def test_gradients_come_back_from_moments(ranks: Ranks, tmp_path: Path, clipping: float) -> None:
    path = write_run(
        tmp_path,
        training={"steps": 3, "gradient_clipping": clipping},
        parallel={"zero_stage": 0},
        checkpoint={"every": 1, "keep": 3},
    )
    [seen] = ranks(1).run(gradients_seen, load_config(path))
    record = RunRecord.open(tmp_path / "run")
    assert len(seen) == 3
    for step, gradients in enumerate(seen, start=1):
        assert sorted(gradients, key=depth) == record.parameters
        assert record.has_gradients(step)
        assert (record.clipping(step) < 0.9) == (clipping > 0)
        for name, gradient in gradients.items():
            off = record.gradient(step, name) - gradient.double()
            assert off.norm() < 1e-5 * gradient.norm(), name


def test_gradients_need_two_steps_in_a_row(tmp_path: Path) -> None:
    one = {"head.logits.weight": torch.ones(2)}
    record = RunRecord.open(write_record(tmp_path / "run", [Step(1.0, 1.0, one, one)] * 4))
    assert [step for step in range(6) if record.has_gradients(step)] == [1, 2, 3, 4]
    del record.checkpoints[2]
    assert [step for step in range(6) if record.has_gradients(step)] == [1, 4]


def test_masters_count_where_there_are_some(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"steps": 1, "precision": "bf16"})
    ranks(1).run(gradients_seen, load_config(path))
    weight = RunRecord.open(tmp_path / "run").weight(1, "embedding.tokens.weight")
    assert weight.dtype == torch.float64
    assert (weight == weight.float()).all() and (weight != weight.bfloat16()).any()


def _remove_config(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def _remove_checkpoints(folder: Path) -> None:
    (folder / "checkpoints").rename(folder / "other")


def _damage_checkpoint(folder: Path) -> None:
    path = folder / "checkpoints" / "step-00000001" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def _remove_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


def _tear_metrics(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "kind": "train"})[:-3])


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_remove_config, "run: not a run folder, it has no config.yaml"),
        (_remove_checkpoints, "run: no checkpoints; run it with checkpoint.every=1"),
        (_damage_checkpoint, "does not match its checksum"),
        (_remove_metrics, "metrics.jsonl: No such file"),
        (_tear_metrics, "metrics.jsonl: a line is not JSON"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, spoil: Any, complaint: str) -> None:
    one = {"head.logits.weight": torch.ones(2)}
    folder = write_record(tmp_path / "run", [Step(1.0, 1.0, one, one)])
    RunRecord.open(folder)
    spoil(folder)
    with pytest.raises(UserError, match=complaint):
        RunRecord.open(folder)
