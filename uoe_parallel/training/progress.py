"""How far a run has come."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """What a checkpoint says of a run beside its tensors. The same on every rank."""

    step: int = 0
    """Optimizer steps that were taken or skipped."""
    batch: int = 0
    """Global batches of the data that are behind: more than steps once the run has rolled back."""
    updates: int = 0
    """How often AdamW has moved the weights: less than steps if some were skipped."""

    @classmethod
    def of(cls, state: Any) -> Progress:
        """What `as_state` gave."""
        return cls(**state)

    def as_state(self) -> dict[str, int]:
        return asdict(self)
