"""What ranks hold alike is compared bit by bit, and who differs is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import Ranks
from tests.programs import metrics, write_run
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.groups import distributed, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.training import replicas
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.progress import Progress
from uoe_parallel.training.replicas import Mismatch, Replicas, checksum
from uoe_parallel.training.trainer import Trainer

NORM = "layers.0.attention_norm.weight"
ROUTER = "layers.0.feed_forward.router_weight/weight"
THRESHOLD = "layers.0.feed_forward/router/Threshold/threshold"
STREAM = "the random stream of the tensor group"
POSITION = "the position in the data"
EMBEDDING = "embedding.tokens.weight"
HEADS = "layers.0.attention.experts.qkv.weight/weight"


def _config(folder: Path, **sections: Any) -> RunConfig:
    small = {"num_layers": sections.get("parallel", {}).get("pipeline", 1), "sequence_length": 8}
    learning = {"selection": "threshold", "threshold_warmup": 1}
    nothing_else = {"validation": None, "test": None}
    sections = {"model": small, "feed_forward": learning, "data": nothing_else} | sections
    return load_config(write_run(folder, **sections))


def _flip(x: Tensor) -> None:
    """The lowest bit of the first element."""
    x.detach().view(-1)[:1].view(torch.uint8)[0] ^= 1


def _flips(config: RunConfig, plan: list[tuple[str, int]]) -> list[Mismatch | None]:
    """On every rank: after a step, what is found before and with each flip, alone, on a rank."""
    with distributed() as device:
        groups = start_groups(ParallelLayout.from_config(config.parallel, dist.get_world_size()))
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        trainer.train_step()
        compared = Replicas(trainer.engine, groups)
        found = [compared.mismatch(trainer.progress)]
        for name, rank in plan:
            # The position is not a tensor of the run's: another one is shown.
            progress = Progress(**trainer.progress.as_state())
            held = {item.name: item.tensor for item in compared._held(progress)}
            if groups.rank == rank and name == POSITION:
                progress.batch += 1
            elif groups.rank == rank:
                _flip(held[name])
            found.append(compared.mismatch(progress))
            if groups.rank == rank and name != POSITION:
                _flip(held[name])
        assert compared.mismatch(trainer.progress) is None
        return found


TENSOR_AND_DATA = [
    (f"{NORM}/weight", 3),
    (f"{NORM}/weight", 0),
    (ROUTER, 2),
    (THRESHOLD, 1),
    (STREAM, 3),
    (POSITION, 1),
    (f"{NORM}/exp_avg", 2),
    (HEADS, 2),
]
"""Of four ranks, of which two share a data rank and two a tensor rank."""
CASES: dict[str, tuple[int, dict[str, Any], list[tuple[str, int]]]] = {
    "tp2-dp2-zero0": (4, {"parallel": {"tensor": 2, "zero_stage": 0}}, TENSOR_AND_DATA),
    "dp2-zero0 bf16": (
        2,
        {"parallel": {"zero_stage": 0}, "training": {"precision": "bf16"}},
        [(f"{NORM}/master", 1), (HEADS, 1), (THRESHOLD, 1)],
    ),
    "pp2-zero0": (
        2,
        {"parallel": {"pipeline": 2, "zero_stage": 0}},
        [(f"{EMBEDDING}/weight", 1), (f"{EMBEDDING}/exp_avg_sq", 1), (POSITION, 1)],
    ),
    "tp2-zero3": (2, {"parallel": {"tensor": 2, "zero_stage": 3}}, [(f"{NORM}/weight", 1)]),
    "dp4-ep2-zero1": (
        4,
        {"parallel": {"expert": 2, "zero_stage": 1}},
        [("layers.0.feed_forward.experts.fc1.weight/weight", 3), (ROUTER, 1), (HEADS, 2)],
    ),
    "pp2-tp2-zero1 bf16": (
        4,
        {"parallel": {"pipeline": 2, "tensor": 2, "zero_stage": 1}}
        | {"training": {"precision": "bf16"}},
        [(f"{EMBEDDING}/weight", 3), ("layers.1.attention_norm.weight/weight", 3), (STREAM, 1)],
    ),
}
FAST = ("tp2-dp2-zero0", "pp2-zero0")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES]
)
def test_flipped_bit_is_named_with_its_rank(ranks: Ranks, tmp_path: Path, name: str) -> None:
    world, sections, plan = CASES[name]
    training = {"micro_batch_size": 1} | sections.get("training", {})
    config = _config(tmp_path, **sections | {"training": training})
    expected = [None, *(Mismatch(what, [rank]) for what, rank in plan)]
    for found in ranks(world).run(_flips, config, plan):
        assert found == expected


class Life(NamedTuple):
    losses: dict[int, float]
    """Of each step that is behind, as it was taken last."""
    tries: int
    error: str | None


def _live(config: RunConfig, rank: int, flips: list[int]) -> Life:
    """On every rank: train; the norm of a rank is hit before these tries to take a step."""
    with distributed() as device:
        groups = start_groups(ParallelLayout.from_config(config.parallel, dist.get_world_size()))
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        losses: dict[int, float] = {}
        take, error, tries = trainer.train_step, None, 0

        def watched() -> Any:
            nonlocal tries
            if tries in flips and groups.rank == rank:
                _flip(trainer.model.get_parameter(NORM))
            result = take()
            losses[trainer.step], tries = result.loss, tries + 1
            return result

        with mock.patch.object(trainer, "train_step", watched):
            try:
                trainer.train()
            except UserError as end:
                error = str(end)
        return Life(losses, tries, error)


def _sections(**replicas: Any) -> dict[str, Any]:
    return {
        "parallel": {"zero_stage": 0},
        "training": {"steps": 5},
        "checkpoint": {"every": 2},
        "replicas": replicas,
    }


def test_repaired_run_equals_one_without_the_fault(ranks: Ranks, tmp_path: Path) -> None:
    routes, logging = str(tmp_path / "routes"), {"every": 2}
    straight = _config(tmp_path / "straight", **_sections(), routes={"record": routes})
    repairing = _sections(check_every=1, on_mismatch="repair")
    hit = _config(tmp_path / "hit", **repairing, routes={"compare": routes}, logging=logging)
    expected = ranks(2).run(_live, straight, 0, [])
    # The first hit is found after a step, the other before a checkpoint that was due.
    lives = ranks(2).run(_live, hit, 1, [2, 5])
    for life, other in zip(lives, expected, strict=True):
        assert life.error is None and life.losses == other.losses
        assert (life.tries, other.tries) == (7, 5)
    events = metrics(tmp_path / "hit" / "run", "event")
    assert [(event["step"], event["done"]) for event in events] == [(3, "repair"), (5, "repair")]
    assert {(event["tensor"], *event["ranks"]) for event in events} == {(f"{NORM}/weight", 1)}
    records = metrics(tmp_path / "hit" / "run")
    assert [record["step"] for record in records] == [2, 4, 5]
    # Steps that were taken again count once.
    of_two, again_of_two, of_one = (record["routes/tokens"] for record in records)
    assert of_two == again_of_two == 2 * of_one > 0
    # And what changed since a report is told from where the run went back to.
    last = metrics(tmp_path / "straight" / "run")[-1]
    drifts = {name: value for name, value in last.items() if "_drift/" in name}
    assert drifts and all(drifts.values())
    assert {name: records[-1][name] for name in drifts} == drifts


def test_replicas_that_differ_reach_no_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    config = _config(tmp_path, **_sections(check_every=100))
    for life in ranks(2).run(_live, config, 1, [2]):
        assert life.tries == 4 and life.error is not None
        assert f"{NORM}/weight differs on rank 1 after step 4, and training stopped" in life.error
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step-00000002"]
    [event] = metrics(tmp_path / "run", "event")
    assert event["done"] == "stop"


def test_fault_that_stays_stops_the_run(ranks: Ranks, tmp_path: Path) -> None:
    sections = _sections(check_every=1, on_mismatch="repair") | {"anomalies": {"limit": 2}}
    for life in ranks(2).run(_live, _config(tmp_path, **sections), 0, [2, 3]):
        assert life.tries == 4 and life.error is not None
    done = [event["done"] for event in metrics(tmp_path / "run", "event")]
    assert done == ["repair", "stop"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_every_bit_and_place_changes_the_checksum(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    sums = {int(checksum(x))}
    for byte in range(x.nbytes):
        for bit in range(8):
            flipped = x.clone()
            flipped.view(-1).view(torch.uint8)[byte] ^= 1 << bit
            sums.add(int(checksum(flipped)))
    assert len(sums) == 1 + 8 * x.nbytes
    assert int(checksum(x.flip(1))) not in sums and int(checksum(-x)) not in sums
    assert int(checksum(x.T)) == int(checksum(x.T.contiguous()))


def test_zeros_of_two_signs_and_two_nans_differ() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    nan = torch.tensor([torch.nan])
    other = (nan.view(torch.int32) + 1).view(torch.float32)
    assert other.isnan() and checksum(nan) != checksum(other) and checksum(nan) == checksum(nan)


class _Largest(TorchDispatchMode):
    """Elements of the largest result that takes memory beside `x`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self._memory = x.untyped_storage().data_ptr()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self._memory:
            self.elements = max(self.elements, result.numel())
        return result


def test_checksum_is_taken_in_chunks() -> None:
    x = torch.randn(1000)
    whole = checksum(x)
    with mock.patch.object(replicas, "_CHUNK", 64), _Largest(x) as largest:
        assert checksum(x) == whole
    assert largest.elements == 64
