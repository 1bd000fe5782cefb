"""How well a model does its task on data that it does not train on."""

from __future__ import annotations

from dataclasses import dataclass

from uoe_parallel.config.schema import Task
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

    @property
    def values(self) -> Values:
        """What is recorded of it."""
        values = {"loss": self.loss, "accuracy": self.accuracy}
        return values | loss_of_text(self.task, self.loss)

    def describe(self, joint: str = ", ") -> str:
        """The loss and what it means, for people; `joint` stands between equal quantities."""
        loss = f"{self.loss:.4f} {LOSS_UNITS[self.task]}"
        if self.task == "next_token":
            return f"{loss}{joint}{bits_per_byte(self.loss):.4f} bits/byte"
        return f"{loss}, accuracy {self.accuracy:.2%}"


def loss_of_text(task: Task, loss: float) -> dict[str, float]:
    """A loss as "bits_per_byte", where it is one of all bytes of a text."""
    return {"bits_per_byte": bits_per_byte(loss)} if task == "next_token" else {}
