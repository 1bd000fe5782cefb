"""One run at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from uoe_parallel.errors import UserError

PATIENCE = 5.0
"""Seconds in which the holder may still leave: a run that was killed and starts again meets what is
left of itself."""
_TICK = 0.1
_TOLD = 200
"""Characters of a lock file that are told: it may be anything."""
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What `flock` says on file systems without locks."""


class RunLock:
    """The file `lock` of a run folder, held by one process. It names its holder.

    The kernel frees the lock of a process that ends, however it ends. Where the file system has no
    locks, or not between its nodes, the run that started last becomes the holder, and the one
    before finds that out when it is to `confirm` that it still is.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: TextIO | None = None
        self._name = ""

    def acquire(self) -> None:
        """Become the holder. Raises UserError if another run is, OSError if the folder can't be
        written."""
        deadline = time.monotonic() + PATIENCE
        while (file := self._try()) is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"run_dir={self._path.parent} belongs to a run that goes on, of "
                    f"{self._holder()}: end that one first, or set run_dir to another folder"
                )
            time.sleep(_TICK)
        now = datetime.now(UTC).isoformat(" ", "microseconds")
        self._file = file
        self._name = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        file.truncate(0)
        file.write(self._name)
        file.flush()
        os.fsync(file.fileno())

    def confirm(self) -> None:
        """Raises UserError if this process was the holder and is no more."""
        if self._file is not None and (holder := self._holder()) != self._name:
            raise UserError(
                f"run_dir={self._path.parent} belongs to another run by now, of {holder}: this one "
                "wrote no more checkpoints. Continue one of them alone, or in another run_dir"
            )

    def release(self) -> None:
        """Let others become the holder. Nothing to do for who is not."""
        if self._file is None:
            return
        if self._holder() == self._name:
            self._path.unlink()
        self._file.close()
        self._file = None

    def _try(self) -> TextIO | None:
        """The open file, locked; None if somebody else has it."""
        file = self._path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                file.close()
                raise
        with suppress(FileNotFoundError):
            # A holder that leaves takes the file away, which may be the one opened here.
            if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                return file
        file.close()
        return None

    def _holder(self) -> str:
        try:
            text = self._path.read_text(errors="replace")
        except FileNotFoundError:
            return "nobody: its lock was removed"
        return "".join(c for c in text if c.isprintable())[:_TOLD] or "somebody"
