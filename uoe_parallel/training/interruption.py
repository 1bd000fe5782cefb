"""Signals by which launchers and schedulers ask a run to leave."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 5.0
"""Seconds. A launcher that hands on what its ranks got too asks them twice within less."""


class Interruption:
    """A context in which `SIGNALS` are noted instead of ending the process. For the main thread.

    Who asks again by SIGTERM, `PATIENCE` seconds or more after the first one, ends the process at
    once, with the code that it would have left with: one that hangs never looks at `signal`.
    """

    def __init__(self) -> None:
        self.signal = 0
        """The number of the last one, 0 if there was none."""
        self._before: dict[signal.Signals, Any] = {}
        self._pipe = (-1, -1)
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # A handler runs when Python's main thread comes round to it. What the interpreter writes
        # into a pipe before that, another thread reads while the main one waits in a collective.
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        reading, writing = self._pipe
        os.close(writing)
        self._listener.join()
        os.close(reading)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _listen(self) -> None:
        first: float | None = None
        while arrived := os.read(self._pipe[0], 1):
            if arrived[0] != signal.SIGTERM:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first >= PATIENCE:
                os._exit(128 + signal.SIGTERM)
