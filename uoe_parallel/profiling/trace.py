"""Steps as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open: a row for each rank.

In the "Trace Event Format": slices of the steps, in them of the calls for which a rank stood still,
in those of the waiting for another rank. What went on behind the rank's own work has bars of its
own above the rows. Times are microseconds of rank 0's clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.profiling.join import Joined

MOST_EVENTS = 1_000_000
"""That browsers open with patience: of more, first steps are shown, or else every n-th rank."""


def write_trace(path: Path, joined: Joined, steps: np.ndarray) -> None:
    """Write the trace; raises OSError.

    steps: [ranks, steps, 3], the number of a step, its begin and its end on rank 0's clock.
    """
    chosen, every = chosen_part(joined)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for event in trace_events(joined, steps, chosen, every):
            file.write(separator + json.dumps(event))
            separator = ",\n"
        file.write("\n]}\n")


def chosen_part(joined: Joined) -> tuple[set[int], int]:
    """Steps, and of how many ranks one, that make no more than `MOST_EVENTS`, one step at least."""
    steps, sizes = np.unique(joined.events["step"], return_counts=True)
    fit = int((sizes.cumsum() <= MOST_EVENTS).sum())
    every = 1 if fit or not len(sizes) else -(-int(sizes[0]) // MOST_EVENTS)
    return set(steps[: max(fit, 1)].tolist()), every


def trace_events(
    joined: Joined, steps: np.ndarray, chosen: set[int], every: int
) -> Iterator[dict[str, Any]]:
    """Of the `chosen` steps and every `every`-th rank, from the first step's begin on."""
    begin = float(steps[..., 1].min())

    def micros(time: float) -> float:
        return round(1e6 * (time - begin), 3)

    yield {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "ranks"}}
    for rank, spans in enumerate(steps.tolist()):
        if rank % every:
            continue
        row = {"pid": 0, "tid": rank}
        yield {"ph": "M", "name": "thread_name", **row, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "thread_sort_index", **row, "args": {"sort_index": rank}}
        for step, start, end in spans:
            if step in chosen or not chosen:
                length = round(1e6 * (end - start), 3)
                common = {"ts": micros(start), "dur": length, "args": {}}
                yield {"ph": "X", "name": f"step {step:.0f}", "cat": "step", **row, **common}
    for number, event in enumerate(joined.events):
        if int(event["rank"]) % every == 0 and int(event["step"]) in chosen:
            yield from _slices(joined, event, number, micros)


def _slices(
    joined: Joined, event: np.void, number: int, micros: Callable[[float], float]
) -> Iterator[dict[str, Any]]:
    kind, group = joined.kinds[event["kind"]], joined.groups[event["group"]]
    row = {"pid": 0, "tid": int(event["rank"])}
    common = {"name": kind.purpose, "cat": Purpose(kind.purpose).category, **row}
    details = {
        "operation": "recv" if kind.receives else kind.operation,
        "group": f"{kind.axis}: {group.name}",
        "phase": kind.phase,
        "bytes": int(event["payload"]),
        "waiting ms": round(1e3 * float(event["waiting"]), 3),
        "moving ms": round(1e3 * float(event["moving"]), 3),
    }
    start = micros(float(event["finished"] - event["blocked"]))
    length = round(1e6 * float(event["blocked"]), 3)
    yield {"ph": "X", **common, "ts": start, "dur": length, "args": details}
    if waiting := round(1e6 * float(event["blocked_waiting"]), 3):
        name = f"waits for rank {int(event['last'])}"
        yield {"ph": "X", **common, "name": name, "ts": start, "dur": waiting, "args": {}}
    if event["hidden"] > 0:
        behind = {**common, "id": number}
        end = float(event["started"] + event["hidden"])
        yield {"ph": "b", **behind, "ts": micros(float(event["started"])), "args": details}
        yield {"ph": "e", **behind, "ts": micros(end), "args": {}}
