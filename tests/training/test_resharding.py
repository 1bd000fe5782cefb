"""A run goes on under another layout as it would have under its own."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import relative_difference
from tests.programs import write_run
from tests.training.runs import Life, live, tensors_of
from uoe_parallel.checkpoint import open_checkpoint
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RunConfig

SAVED, STEPS = 3, 6
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tp1": (1, {"zero_stage": 0}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "dp2-zero0": (2, {"zero_stage": 0}),
    "dp2-zero2": (2, {"zero_stage": 2}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "dp2-ep2": (2, {"expert": 2}),
    "tp2-dp2-ep4": (4, {"tensor": 2, "expert": 4}),
    "tp2-dp2-zero3": (4, {"tensor": 2, "zero_stage": 3}),
    "pp2-dp2-ep2": (4, {"pipeline": 2, "expert": 2}),
}
"""World size and axes; ZeRO 1 where they do not say."""
CHANGES = [
    *(("tp2", "tp1"), ("tp1", "tp2"), ("pp2", "tp1"), ("tp1", "dp2"), ("dp2", "dp2-zero3")),
    ("dp2-ep2", "tp2"),
]
MORE_CHANGES = [
    *(("tp2-dp2-ep4", "tp2"), ("tp2", "tp2-dp2-ep4"), ("dp2-zero3", "pp2-dp2-ep2")),
    *(("pp2-dp2-ep2", "tp2-dp2-zero3"), ("dp2-zero0", "dp2-zero2"), ("dp2-zero2", "tp1")),
]
SECTIONS = {
    "feed_forward": {
        "selection": "threshold",
        "threshold_warmup": 2,
        "segment_length": 4,
        "segment_experts": 6,
    },
    "attention": {"balance": ["bias"]},
}

Run = tuple[Path, list[Life]]


def _config(folder: Path, layout: str, *overrides: str) -> RunConfig:
    """`folder`'s run under a layout."""
    parallel = [f"parallel.{name}={value}" for name, value in LAYOUTS[layout][1].items()]
    return load_config(folder / "run.yaml", [*parallel, *overrides, f"run_dir={folder / layout}"])


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """By layout: the folder of a run that was saved at `SAVED` and went on under it, and its
    life."""
    folder = tmp_path_factory.mktemp("straight")
    write_run(folder, **SECTIONS, training={"steps": STEPS}, checkpoint={"every": SAVED})
    runs: dict[str, Run] = {}

    def run(layout: str) -> Run:
        if layout not in runs:
            lives = ranks(LAYOUTS[layout][0]).run(live, _config(folder, layout))
            runs[layout] = folder / layout, lives
        return runs[layout]

    return run


def _resume(straight: Path, folder: Path, layout: str) -> RunConfig:
    """The config of a run that goes on in a copy of `straight` from the checkpoint of `SAVED`."""
    shutil.copy(straight.parent / "run.yaml", folder)
    kept = f"checkpoints/step-{SAVED:08d}"
    shutil.copytree(straight / kept, folder / layout / kept)
    return _config(folder, layout)


@pytest.mark.parametrize(
    ("before", "after"),
    [*CHANGES, *(pytest.param(*change, marks=pytest.mark.slow) for change in MORE_CHANGES)],
)
def test_run_goes_on_as_under_its_own_layout(
    ranks: Ranks,
    straight: Callable[[str], Run],
    tmp_path: Path,
    before: str,
    after: str,
) -> None:
    folder, [expected, *_] = straight(before)
    config = _resume(folder, tmp_path, after)
    for life in ranks(LAYOUTS[after][0]).run(live, config):
        assert list(life.steps) == [4, 5, 6]
        for step, seen in life.steps.items():
            assert seen.loss == pytest.approx(expected.steps[step].loss, rel=2e-5)
            assert seen.gradient_norm == pytest.approx(expected.steps[step].gradient_norm, rel=2e-5)
        assert life.validation == pytest.approx(expected.validation, rel=2e-5)
    roots = (folder / "checkpoints", Path(config.run_dir) / "checkpoints")
    wanted, found = (open_checkpoint(root, STEPS, None).state for root in roots)
    assert [found[name] == wanted[name] for name in ("progress", "identity")] == [True, True]
    _assert_close(tensors_of(Path(config.run_dir), STEPS), tensors_of(folder, STEPS))


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each kind of entry (weights, first moments, thresholds...) against its own global norm."""
    kinds: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in expected.items():
        if not key.startswith("random/"):
            kinds[key.rsplit("/", 1)[1]][key] = tensor.double()
    assert kinds.keys() == {
        *("weight", "exp_avg", "exp_avg_sq", "threshold", "spread", "steps", "bias")
    }
    for kind, tensors in kinds.items():
        assert any(tensor.any() for tensor in tensors.values()), kind
        resumed = {key: found[key].double() for key in tensors}
        worst, name = relative_difference(resumed, tensors, eps=1e-3)
        assert worst < 2e-4, name


def test_random_streams_go_on_where_they_were_and_new_places_begin_anew(
    ranks: Ranks, tmp_path: Path
) -> None:
    """A run with dropout does not go on alike, since other ranks draw for its tokens; but nobody
    draws the same numbers twice."""
    write_run(tmp_path, training={"steps": 2}, checkpoint={"every": 1})
    dropout = ["model.dropout=0.2", "model.attention_dropout=0.2", "training.steps=1"]
    config = _config(tmp_path, "tp1", *dropout)
    ranks(1).run(live, config)
    saved = _streams(config, 1)
    # Without dropout nobody draws: the next checkpoint has the streams as they were taken up.
    shutil.copytree(tmp_path / "tp1", tmp_path / "dp2")
    config = _config(tmp_path, "dp2")
    ranks(2).run(live, config)
    resumed = _streams(config, 2)
    shutil.rmtree(tmp_path / "dp2")
    ranks(2).run(live, config)
    fresh = _streams(config, 2)

    assert saved.keys() < resumed.keys() == fresh.keys()
    for key, state in resumed.items():
        assert torch.equal(state, saved.get(key, fresh[key])), key
        assert (key in saved) == (not torch.equal(state, fresh[key])), key


def _streams(config: RunConfig, step: int) -> dict[str, Tensor]:
    tensors = tensors_of(Path(config.run_dir), step)
    return {key: tensor for key, tensor in tensors.items() if "/stage-" in key}
