"""What the test process and its ranks say to each other, as pickled bytes over a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HANGING = "Hanging"
DIED = "Died"


@dataclass(frozen=True)
class Case:
    """One function call on one rank of a world."""

    call: bytes
    """Pickled (function, args, kwargs): unpickled by the rank where errors are reported."""
    rank: int
    world_size: int
    store: Path
    """A new file at which the ranks of this case meet."""
    master_port: int
    """For code that starts torch.distributed again from the environment."""


@dataclass(frozen=True)
class Success:
    value: bytes
    """Pickled return value."""


@dataclass(frozen=True)
class RankFailure:
    """Why a rank has no result. Names and texts only: exceptions themselves may not pickle."""

    type_name: str
    """Of the exception, or HANGING or DIED."""
    message: str
    traceback: str = ""
    output: str = ""
    """The end of what the rank wrote to stdout and stderr, stacks of a hanging rank included."""

    def __str__(self) -> str:
        parts = [self.traceback.rstrip() or f"{self.type_name}: {self.message}"]
        if self.output:
            parts.append(f"its output:\n{self.output}")
        return "\n".join(parts)
