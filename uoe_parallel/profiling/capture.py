"""From a trainer's steps to a profile of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
from torch.distributed import ProcessGroup

from uoe_parallel.analysis.simulate import build_stage, sample_exchanges
from uoe_parallel.analysis.traffic import step_traffic
from uoe_parallel.analysis.transfer import Transfer, group_ranks
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.agreement import gather_json, shared_fate
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.profiling.alone import bandwidths, measure_alone, sizes_of
from uoe_parallel.profiling.charts import write_profile_charts
from uoe_parallel.profiling.clock import ClockReading, on_main_clock, read_clock
from uoe_parallel.profiling.join import Joined, gather_events
from uoe_parallel.profiling.recorder import Recorder
from uoe_parallel.profiling.report import Profile, StepSeconds, print_profile, profile_as_json
from uoe_parallel.profiling.summary import (
    Row,
    category_times,
    expected_amounts,
    group_rows,
    summarise,
)
from uoe_parallel.profiling.trace import write_trace

Span = tuple[int, float, float]
"""A step, and when it began and ended: seconds of a clock."""


class StepCapture:
    """A `StepObserver` that records the collectives of some steps and times others beside them."""

    def __init__(
        self,
        config: RunConfig,
        groups: ParallelGroups,
        device: Device,
        *,
        recorded: Container[int],
        plain: Container[int],
        in_turns: bool,
    ) -> None:
        """recorded, plain: steps, from 0; in_turns: whether the ones come between the others."""
        self.config = config
        self.groups = groups
        self.device = device
        self.recorded, self.plain, self.in_turns = recorded, plain, in_turns
        self.recorder = Recorder(groups)
        self.spans: list[Span] = []
        """Of recorded steps."""
        self.plain_seconds: list[float] = []
        self._clock: ClockReading | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        if number in self.recorded:
            self._clock = self._clock or read_clock(self.groups.world)
            self.recorder.step = number
            start = self._now()
            with self.recorder:
                yield
            self.spans.append((number, start, self._now()))
        elif number in self.plain:
            start = self._now()
            yield
            self.plain_seconds.append(self._now() - start)
        else:
            yield

    def _now(self) -> float:
        self.device.synchronize()
        return perf_counter()

    def conclude(self) -> Captured | None:
        """Join what the ranks recorded, and measure the same collectives alone. Collective; the
        result is on rank 0, None on the others."""
        assert self._clock is not None, "no step was recorded"
        world, before, after = self.groups.world, self._clock, read_clock(self.groups.world)
        transfers, ranks = self._expected(), group_ranks(self.groups)
        axes = {(t.purpose, t.operation, ranks[t.group]): t.group for t in transfers}
        joined = gather_events(self.recorder.events, before, after, world, axes)
        steps, *ends = np.array(self.spans).T
        ends = [on_main_clock(end, before, after) for end in ends]
        spans = gather_json(np.stack((steps, *ends)).T.tolist(), world)
        plain = gather_json(self.plain_seconds, world)
        expected = gather_json([astuple(transfer) for transfer in transfers], world)
        rows: list[Row] = []
        if joined is not None:
            amounts = expected_amounts([Transfer(*t) for t in of_rank] for of_rank in expected)
            rows = summarise(joined, len(steps), amounts)
        alone = measure_alone(sizes_of(rows), self.groups, self.device)
        if joined is None:
            return None
        reached = bandwidths(alone)
        times = np.array(spans)
        counted = (times[..., 2] - times[..., 1]).max(0)
        profile = Profile(
            layout=str(self.groups.layout),
            world_size=world.size(),
            steps=[int(step) for step in steps],
            seconds=StepSeconds(
                counted.tolist(),
                [max(seconds) for seconds in zip(*plain, strict=True)],
                self.in_turns,
            ),
            categories=category_times(joined, len(steps), world.size()),
            rows=[replace(row, alone_bandwidth=reached.get(row.size)) for row in rows],
            groups=group_rows(joined, len(steps)),
            alone=alone,
        )
        return Captured(profile, joined, times)

    def _expected(self) -> list[Transfer]:
        """What this rank sends in a step, with drawn routes."""
        model = build_stage(self.config, self.groups)
        return step_traffic(model, self.config, sample_exchanges(model, self.config, seed=0))


@dataclass(frozen=True)
class Captured:
    """What rank 0 knows of the recorded steps."""

    profile: Profile
    joined: Joined
    steps: np.ndarray
    """[ranks, steps, 3]: the number of a step, its begin and its end, seconds of rank 0's clock."""

    def write(self, folder: Path) -> None:
        """Table, JSON, trace and charts, to a folder that is made; raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "table.txt").open("w", encoding="utf-8") as file:
            print_profile(self.profile, file)
        tree = profile_as_json(self.profile)
        (folder / "profile.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        write_trace(folder / "trace.json", self.joined, self.steps)
        write_profile_charts(self.profile, folder)


def write_shared(captured: Captured | None, folder: Path, group: ProcessGroup) -> None:
    """Write what rank 0 captured. Collective; raises UserError on every rank if it can't."""
    with shared_fate(
        f"the profile cannot be written to {folder}", "Choose a folder with room", group
    ):
        if captured is not None:
            captured.write(folder)


class RunProfiler:
    """A `StepObserver` for the steps that `profile:` in a run's config names.

    After the last one it writes what it found. A run that resumes after them does nothing; one
    that resumes among them looks at the rest.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ParallelGroups,
        device: Device,
        say: Callable[[str], None],
    ) -> None:
        """say: tells the user of the run."""
        first, steps = config.profile.first_step, config.profile.steps
        self.window = range(first, first + steps)
        # DeepSpeed says and builds more in its first two steps.
        plain = range(max(2, first - steps), first)
        self.capture = StepCapture(
            config, groups, device, recorded=self.window, plain=plain, in_turns=False
        )
        self.folder = Path(config.run_dir) / "profile" / f"step-{first}"
        self.say = say

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        with self.capture.step(number):
            yield
        if self.window and number == self.window[-1]:
            captured = self.capture.conclude()
            write_shared(captured, self.folder, self.capture.groups.world)
            self.say(f"profile: {self.folder}")
