"""What a comparison's runs came to."""

from __future__ import annotations

from dataclasses import dataclass

from uoe_parallel.comparison.settings import ComparisonConfig


@dataclass(frozen=True)
class Point:
    """A validation of a run."""

    step: int
    tokens: int
    """Trained on until then."""
    flops: float
    """Of training until then, by `model_flops_per_token`."""
    loss: float
    """Nats per label that counts."""


@dataclass(frozen=True)
class Run:
    """One training that is compared."""

    seed: int
    curve: list[Point]
    loss: float
    """Held out: of the test split after the last step, nats per label that counts."""
    accuracy: float
    """There, 0 to 1."""
    bits_per_byte: float | None
    """There, where tokens are bytes of a text."""
    seconds_per_step: float
    """Median over reports."""
    peak_memory: int
    """Bytes of the fullest rank's process or device."""
    load_max_over_mean: float | None
    """Busiest expert over the mean one, mean over routed blocks and the last half of the run's
    reports; None without routed blocks."""
    load_entropy: float | None
    """As above: 1 is even."""
    experts_per_token: dict[str, float]
    """By kind of block ("attention", "feed_forward"), beside shared ones, as above."""
    dropped_share: float | None
    """Of pairs, as above."""


@dataclass(frozen=True)
class Result:
    """Of one contender."""

    name: str
    about: str
    parameters: int
    active_parameters: int
    flops_per_token: float
    """Forward and backward."""
    steps: int
    """Of each compared run."""
    tokens: int
    """Of each compared run."""
    learning_rate: float
    """The best of the sweep."""
    sweep: dict[float, float]
    """Validation loss (nats) by learning rate; infinite where a run came to no finite loss."""
    sweep_flops: float
    """Of all tries together."""
    runs: list[Run]
    """By seed, the same seeds for every contender."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a report tells."""

    config: ComparisonConfig
    task: str
    """model.task of the runs."""
    jobs: int
    """Runs that trained at once, and shared the machine."""
    results: list[Result]
    """In the order of the config; contenders with no whole set of runs yet are left out."""
