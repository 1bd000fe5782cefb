"""A checkpoint is found by its own path, its run's, or that of the folder between."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.examples import save
from uoe_parallel.checkpoint import locate_checkpoint, read_manifest
from uoe_parallel.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "checkpoints", step)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "step"), [("", 2), ("checkpoints", 2), ("checkpoints/step-00000001", 1)]
)
def test_any_of_its_paths_names_it(run: Path, path: str, step: int) -> None:
    assert locate_checkpoint(run / path, None).step == step
    assert read_manifest(run / path).step == step


def test_a_damaged_manifest_is_passed_over(run: Path) -> None:
    damaged = run / "checkpoints" / "step-00000002"
    (damaged / "manifest.json").write_text("{")

    assert locate_checkpoint(run, None).step == read_manifest(run).step == 1
    for look in (read_manifest, lambda path: locate_checkpoint(path, None)):
        with pytest.raises(UserError, match=r"step-00000002.* whole"):
            look(damaged)


@pytest.mark.parametrize("path", ["", "nowhere", "step-00000003"])
def test_nothing_there_is_told(tmp_path: Path, path: str) -> None:
    for look in (read_manifest, lambda path: locate_checkpoint(path, None)):
        with pytest.raises(UserError, match=r"holds no whole|no checkpoint|is not there"):
            look(tmp_path / path)
