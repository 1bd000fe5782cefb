"""What a user asks of a verification. Importing it imports no library of the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uoe_parallel.config.schema import Precision, RunConfig

FaultKind = Literal["scale-gradient", "skip-reduction"]
RoutesUse = Literal["compare", "replay"]


@dataclass(frozen=True)
class FaultRequest:
    """A fault to plant in every run but the reference."""

    kind: FaultKind
    seed: int
    """Picks the parameter or the reduction."""


@dataclass(frozen=True)
class PlantedFault:
    """What came of it in one run."""

    what: str
    """In words."""
    parameter: str
    """Whose gradient is the first to be wrong in a backward pass."""


@dataclass(frozen=True)
class Tolerances:
    """The largest differences that pass."""

    loss: float
    gradient_norm: float
    gradients: float
    weights: float


@dataclass(frozen=True)
class Request:
    """One verification."""

    config_path: Path
    config: RunConfig
    ranks: int
    """The most that a layout may have."""
    patterns: list[str]
    """Of names of layouts; empty for all of 2 ranks and more."""
    steps: int
    shrink: bool
    precision: Precision
    routes: RoutesUse
    """What runs do with the reference's routes: count tokens that go elsewhere, or follow them."""
    tolerances: Tolerances
    eps: float
    timeout: float
    """Seconds that a run may take."""
    keep: Path | None
    """Where run folders stay."""
    results: Path
    """A JSON file."""
    fault: FaultRequest | None
