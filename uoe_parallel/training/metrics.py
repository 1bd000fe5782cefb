"""The run's record: one JSON line per report, the same numbers as TensorBoard events.

Shape legend: L layers, N experts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

Kind = Literal["train", "validation", "test", "event"]
Values = Mapping[str, float]

PERCENTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
"""Of a value over all routed blocks: names, and quantiles."""


@dataclass(frozen=True)
class Bars:
    """Numbers, not negative, that are heights of bars."""

    heights: Sequence[float]
    edges: Sequence[float] | None = None
    """Of the bars, one more than there are; the last may be infinite. None centres them on 0, 1,
    2 and so on, such as experts."""


Value = float | str | Sequence[float] | Bars


class MetricsWriter:
    """Writes <run_dir>/metrics.jsonl and, if asked, events in <run_dir>/tensorboard.

    For rank 0 alone: the others have none. What `write` returned from outlives a killed process;
    a line that a crash tore is dropped when the next writer is made. A run that starts or resumes
    calls `truncate_after` before its first `write`.
    """

    def __init__(self, run_dir: Path, tensorboard: bool) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._events_dir = run_dir / "tensorboard" if tensorboard else None
        self._events: SummaryWriter | None = None
        self._purge_step: int | None = None
        run_dir.mkdir(parents=True, exist_ok=True)
        self._keep_lines(math.inf)

    def truncate_after(self, step: int) -> None:
        """Forget what was written for steps after `step`, which are about to be taken again.

        0 or more for a resumed run, -1 for one that starts over. What is of kind "event" has
        happened and stays, unless the run starts over. TensorBoard keeps the old events in its
        files and hides them.
        """
        self._keep_lines(step)
        self.close()
        self._purge_step = step + 1

    def write(self, step: int, kind: Kind, values: Mapping[str, Value]) -> None:
        """Append `values` at optimizer step `step`.

        The line is {"step": step, "kind": kind, **values}, with bars as the list of their heights;
        NaN and infinities, which JSON lacks, become null. TensorBoard has "<kind>/<name>": of a
        number a scalar, of a list the histogram of its finite numbers, of bars a histogram that
        shows them as they are, of a text the text.
        """
        assert not {"step", "kind"} & values.keys()
        record = {
            "step": step,
            "kind": kind,
            **{name: _json(value) for name, value in values.items()},
        }
        # Opened anew each time: reports are rare, and no open handle can outlive a rewrite.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._events_dir is not None:
            self._write_events(self._events_dir, step, kind, values)

    def has(self, step: int, kind: Kind) -> bool:
        """Whether a line of this kind was written for `step`."""
        if not self._path.exists():
            return False
        with self._path.open(encoding="utf-8") as file:
            records = map(json.loads, file)
            return any(r["step"] == step and r["kind"] == kind for r in records)

    def close(self) -> None:
        """Finish the TensorBoard file; a later `write` starts another one."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _write_events(
        self, folder: Path, step: int, kind: Kind, values: Mapping[str, Value]
    ) -> None:
        if self._events is None:
            # Imported here because it takes a second that runs without TensorBoard need not pay.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._events = SummaryWriter(str(folder), purge_step=self._purge_step)
            self._purge_step = None
        for name, value in values.items():
            tag = f"{kind}/{name}"
            if isinstance(value, Bars):
                self._events.add_histogram_raw(tag, **_histogram(value), global_step=step)
            elif isinstance(value, str):
                self._events.add_text(tag, value, step)
            elif isinstance(value, Sequence):
                finite = np.array([v for v in value if math.isfinite(v)])
                if finite.size:
                    self._events.add_histogram(tag, finite, step)
            else:
                self._events.add_scalar(tag, value, step)
        self._events.flush()

    def _keep_lines(self, last_step: float) -> None:
        """Rewrite the file, if need be, with its whole lines of steps up to `last_step`."""
        if not self._path.exists():
            return
        old = self._path.read_bytes()
        new = b"".join(_lines_up_to(last_step, old.splitlines(keepends=True)))
        if new == old:
            return
        partial = self._path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole records of a metrics.jsonl, also of one that is still being written."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in _lines_up_to(math.inf, lines)]


def bits_per_byte(nats_per_token: float) -> float:
    """A loss per token of one byte, in nats, as bits per byte of text."""
    return nats_per_token / math.log(2.0)


def load_statistics(counts_LN: Tensor) -> tuple[Tensor, Tensor]:
    """How evenly each layer's experts are used.

    Args:
        counts_LN: tokens each expert took, any real dtype, not negative, N >= 1.

    Returns:
        max_over_mean_L: the busiest expert's load over the mean load, fp64, 1 (even) to N.
        entropy_L: entropy of the load distribution over log N, fp64, 0 (one expert) to 1 (even).
        A layer without any token, or with one expert, counts as even.
    """
    num_experts = counts_LN.shape[-1]
    counts_LN = counts_LN.double()
    total_L1 = counts_LN.sum(-1, keepdim=True)
    share_LN = torch.where(total_L1 > 0, counts_LN / total_L1, 1.0 / num_experts)
    max_over_mean_L = share_LN.amax(-1) * num_experts
    if num_experts == 1:
        return max_over_mean_L, torch.ones_like(max_over_mean_L)
    entropy_L = torch.special.entr(share_LN).sum(-1) / math.log(num_experts)
    return max_over_mean_L, entropy_L.clamp(max=1.0)  # rounding may pass 1 by an ulp


def _json(value: Value) -> JsonValue:
    if isinstance(value, Bars):
        value = value.heights
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [v if math.isfinite(v) else None for v in value]
    return value if math.isfinite(value) else None


def _histogram(bars: Bars) -> dict[str, Any]:
    """As TensorBoard keeps histograms: by right edges, and the ends of the bars that have a height,
    for it leaves out the others on both sides."""
    heights = [height if math.isfinite(height) else 0.0 for height in bars.heights]
    edges = bars.edges or [i - 0.5 for i in range(len(heights) + 1)]
    *_, before, last = edges
    if math.isinf(last):  # an open end has no width to draw
        edges = [*edges[:-1], 2 * before - edges[-3]]
    shown = [i for i, height in enumerate(heights) if height > 0] or [0]
    middles = [(left + right) / 2 for left, right in pairwise(edges)]
    return {
        "min": edges[shown[0]],
        "max": edges[shown[-1] + 1],
        "num": sum(heights),
        "sum": sum(h * m for h, m in zip(heights, middles, strict=True)),
        "sum_squares": sum(h * m * m for h, m in zip(heights, middles, strict=True)),
        "bucket_limits": edges[1:],
        "bucket_counts": heights,
    }


def _lines_up_to(last_step: float, lines: Iterable[bytes]) -> Iterable[bytes]:
    """The lines that are whole records of steps up to `last_step`, or of events if that is none of
    before the first."""
    for line in lines:
        try:
            record = json.loads(line)
            is_kept = record["step"] <= last_step or (record["kind"] == "event" and last_step >= 0)
        except (ValueError, TypeError, KeyError):  # no JSON, or no record of ours
            continue
        if is_kept and line.endswith(b"\n"):
            yield line
