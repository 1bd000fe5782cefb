"""Times every collective of a rank while a context is open."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from uoe_parallel.analysis.observe import Call, Interception
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.profiling.events import Event


@dataclass(slots=True)
class _Note:
    """A collective that its caller has not gone on from."""

    call: Call
    number: int
    step: int
    started: Any
    waited: Any = None
    work: Any = None
    """Of an asynchronous one, that may be over before it is waited for."""
    was_over: bool = False


class Recorder(Interception):
    """A context that notes an `Event` of every collective of this rank, in the order in which their
    caller went on. One that nobody waited for is left out.

    On CUDA the times are those of the stream that waits, and are known when the context closes,
    which waits for the device.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        super().__init__(groups)
        self.events: list[Event] = []
        self.step = -1
        """The training step that events are of, set by whoever steps."""
        self._stream = StreamClock() if torch.cuda.is_available() else None
        self._now: Callable[[], Any] = self._stream or time.perf_counter
        self._numbers: dict[tuple[int, ...] | str, int] = defaultdict(int)

    def called(self, call: Call) -> _Note:
        number = self._numbers[call.way]
        self._numbers[call.way] = number + 1
        return _Note(call, number, self.step, self._now())

    def launched(self, note: _Note, work: Any) -> None:
        if note.call.is_async and self._stream is None:
            note.work = work

    def waits(self, note: _Note) -> None:
        note.waited = self._now() if note.call.is_async else note.started
        # A callback when it completes would tell more, from a thread that stops this one for it.
        note.was_over = note.work is not None and note.work.is_completed()

    def waited(self, note: _Note) -> None:
        call, finished = note.call, self._now()
        ended = note.waited if note.was_over else finished
        self.events.append(
            Event(
                call.operation,
                call.ranks,
                self.naming.axis(call.group, call.ranks),
                call.purpose,
                call.phase,
                note.step,
                note.number,
                call.payload,
                call.kept,
                note.started,
                note.waited,
                finished,
                ended,
                call.is_async,
            )
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._stream is not None:
            self.events[:] = self._stream.resolved(self.events)


class StreamClock:
    """Marks on the current CUDA stream, in place of seconds until the device has come to them."""

    def __init__(self) -> None:
        self._start, self._seconds = self(), time.perf_counter()

    def __call__(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def resolved(self, events: list[Event]) -> list[Event]:
        """With seconds of `time.perf_counter` in place of marks."""
        torch.cuda.synchronize()

        def seconds(mark: Any) -> float:
            if isinstance(mark, float):
                return mark
            return self._seconds + self._start.elapsed_time(mark) / 1000

        names = ("started", "waited", "finished", "ended")
        return [
            event._replace(**{name: seconds(getattr(event, name)) for name in names})
            for event in events
        ]
