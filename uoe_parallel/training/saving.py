"""When and how a run's checkpoints are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from uoe_parallel.checkpoint import Piece, save_checkpoint
from uoe_parallel.config.schema import CheckpointConfig
from uoe_parallel.parallel.groups import ParallelGroups


class Saver:
    """Writes checkpoints to a folder. Used by every rank alike."""

    def __init__(self, folder: Path, config: CheckpointConfig, groups: ParallelGroups) -> None:
        self._folder = folder
        self._config = config
        self._groups = groups

    @property
    def has_failed(self) -> bool:
        """Whether `finish` would raise, as far as this rank knows."""
        return False

    def save(self, step: int, pieces: Sequence[Piece], state: Mapping[str, JsonValue]) -> Path:
        """Save this rank's `pieces` as the checkpoint of `step`; its folder. Collective over all
        ranks. Raises UserError on every rank if it can't be written, or the one before could not.
        """
        keep = self._config.keep
        return save_checkpoint(self._folder, step, pieces, state, self._groups.world, keep)

    def finish(self) -> None:
        """Wait until what is being written is on the disk. Collective over all ranks, which raise
        UserError if it could not be written."""
