"""Small checkpoints for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch

from uoe_parallel.checkpoint import CheckpointReader, Piece, find_checkpoint, save_checkpoint

WEIGHT = "layer.weight"


def weight(step: int) -> torch.Tensor:
    """[4, 6], another one at every step."""
    return torch.arange(24.0).reshape(4, 6) + 100 * step


def save(root: Path, step: int, keep: int | None = 10) -> Path:
    """A checkpoint of two pieces by one process."""
    upper, lower = weight(step).split(2)
    pieces = [Piece(WEIGHT, upper, (4, 6), (0, 0)), Piece(WEIGHT, lower, (4, 6), (2, 0))]
    return save_checkpoint(root, step, pieces, {"tokens": 10 * step}, None, keep)


def found(root: Path) -> CheckpointReader:
    """The newest whole checkpoint, which must be one that `save` wrote."""
    reader = find_checkpoint(root, None)
    assert reader is not None
    assert reader.state == {"tokens": 10 * reader.step}
    assert torch.equal(reader.read(WEIGHT), weight(reader.step))
    return reader


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())
