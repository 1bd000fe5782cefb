"""What the ranks of a job do to themselves, handed to them in a file."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a fault comes, once and when it is told to."""

    rank: int
    call: int
    armed: str
    """The file that tells it to come."""
    mark: str
    """The file that it leaves."""

    def takes_place(self) -> bool:
        """Whether it comes now; it leaves its mark then."""
        if not Path(self.armed).exists() or Path(self.mark).exists():
            return False
        Path(self.mark).touch()
        return True


@dataclass(frozen=True)
class Plan:
    """What the ranks of a job do beside training, read by each of its lives."""

    log: str
    """Of starts and steps, a JSON object a line."""
    pace: str
    """A file with the seconds that a step is followed by."""
    nan_batch: int | None = None
    """The batch of the data whose gradients have a NaN, each time that it is taken."""
    nan_mark: str | None = None
    """The file that it leaves."""
    flip: Place | None = None
    """A bit of a weight that ranks hold alike, at the end of a step."""
    kill_in_save: Place | None = None
    """`call`: which of the writes that wait for the disk, from 1."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        tree = json.loads(path.read_text())
        for name in ("flip", "kill_in_save"):
            if tree[name] is not None:
                tree[name] = Place(**tree[name])
        return cls(**tree)

    def note(self, **record: Any) -> None:
        line = json.dumps({"time": time.time(), "process": os.getpid(), **record}) + "\n"
        with Path(self.log).open("a") as file:
            file.write(line)
