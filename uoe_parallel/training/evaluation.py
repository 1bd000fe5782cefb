"""How well a model does its task on data that it does not train on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from uoe_parallel.config.schema import RunConfig, Task
from uoe_parallel.training.metrics import Values, bits_per_byte

LOSS_UNITS: dict[Task, str] = {
    "next_token": "nats/token",
    "masked_token": "nats/masked token",
    "classification": "nats/document",
}
"""Of the loss of each task."""


@dataclass(frozen=True)
class Evaluation:
    """The same on every rank."""

    task: Task
    loss: float
    """Nats per label that counts."""
    accuracy: float
    """Share of these labels that are the model's best guess, 0 to 1."""
    of_text: dict[str, float]
    """As `loss_of_text`."""

    @property
    def values(self) -> Values:
        """What is recorded of it."""
        return {"loss": self.loss, "accuracy": self.accuracy, **self.of_text}

    def describe(self, joint: str = ", ") -> str:
        """The loss and what it means, for people; `joint` stands between equal quantities."""
        loss = f"{self.loss:.4f} {LOSS_UNITS[self.task]}"
        if bits := self.of_text.get("bits_per_byte"):
            return f"{loss}{joint}{bits:.4f} bits/byte"
        if perplexity := self.of_text.get("perplexity"):
            return f"{loss}{joint}perplexity {perplexity:.2f}"
        return f"{loss}, accuracy {self.accuracy:.2%}"


def loss_of_text(config: RunConfig, loss: float) -> dict[str, float]:
    """The loss of a whole text as "bits_per_byte" where its tokens are bytes, else as "perplexity",
    and as neither where it is not of a whole text."""
    if config.model.task != "next_token":
        return {}
    if config.data.tokenizer == "bytes":
        return {"bits_per_byte": bits_per_byte(loss)}
    # Overflows before a loss does.
    return {"perplexity": math.exp(min(loss, 700.0))}
