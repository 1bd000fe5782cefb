"""When and how a run's checkpoints are written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self

from pydantic import JsonValue

from uoe_parallel.checkpoint import Piece, save_checkpoint
from uoe_parallel.config.schema import CheckpointConfig
from uoe_parallel.errors import Interrupted, UserError
from uoe_parallel.parallel.groups import ParallelGroups, start_aside_group
from uoe_parallel.parallel.purposes import aside

_PATIENCE = 60.0
"""Seconds that a rank which breaks down stays for what it writes, so that the others' save ends."""


class Saver:
    """Writes checkpoints to a folder, as a context that is left when all are on the disk. Used by
    every rank alike.

    If they are written asynchronously, a thread of each rank does it while training goes on, with
    collectives on a group of its own, one checkpoint at a time. It is a daemon: a rank that breaks
    down must come to its end also when the others never answer its thread.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        groups: ParallelGroups,
        say: Callable[[str], None],
    ) -> None:
        """Collective over all ranks. `say` is told of each checkpoint, maybe from another
        thread."""
        self._folder = folder
        self._config = config
        self._say = say
        self._stalled: float | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group = start_aside_group() if config.asynchronous else groups.world

    @property
    def has_failed(self) -> bool:
        """Whether `finish` would raise, as far as this rank knows."""
        return self._error is not None

    def save(
        self, step: int, capture: Callable[[], Sequence[Piece]], state: Mapping[str, JsonValue]
    ) -> None:
        """Save this rank's pieces, which `capture` returns, as the checkpoint of `step`. Collective
        over all ranks, on which training stands still until this returns.

        Raises UserError on every rank if the checkpoint, or an asynchronous one before, can't be
        written.
        """
        start = perf_counter()
        self.finish()  # before the capture: memory has room for one copy of the state
        pieces = capture()
        if self._config.asynchronous:
            stalled = perf_counter() - start
            self._thread = threading.Thread(
                target=self._write_aside, args=(step, pieces, state, stalled), daemon=True
            )
            self._thread.start()
        else:
            written = self._write(step, pieces, state)
            stalled = perf_counter() - start
            self._say(f"checkpoint: {written} (training stood still {stalled:.2f} s)")
        self._stalled = (self._stalled or 0.0) + stalled

    def finish(self) -> None:
        """Wait until what is being written is on the disk. Called by all ranks, which raise
        UserError if it could not be written."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take_stall(self) -> float | None:
        """Seconds that training has stood still for checkpoints since the last take; None if there
        was none."""
        stalled, self._stalled = self._stalled, None
        return stalled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, Interrupted):
            self.finish()
        elif self._thread is not None:
            # All ranks leave by a UserError; by anything else maybe this one alone.
            self._thread.join(None if isinstance(error, UserError) else _PATIENCE)

    def _write(self, step: int, pieces: Sequence[Piece], state: Mapping[str, JsonValue]) -> Path:
        return save_checkpoint(self._folder, step, pieces, state, self._group, self._config.keep)

    def _write_aside(
        self,
        step: int,
        pieces: Sequence[Piece],
        state: Mapping[str, JsonValue],
        stalled: float,
    ) -> None:
        """The life of the thread."""
        start = perf_counter()
        try:
            with aside():
                written = self._write(step, pieces, state)
            seconds = perf_counter() - start
            self._say(
                f"checkpoint: {written} (training stood still {stalled:.2f} s, written in "
                f"{seconds:.2f} s)"
            )
        except BaseException as error:  # raised by `finish`, on the rank's own thread
            self._error = error
