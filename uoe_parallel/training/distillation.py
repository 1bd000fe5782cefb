"""Learning from a dense teacher: the model's own frozen weights with all experts on.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from uoe_parallel.config.schema import DistillationConfig
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.model.language_model import LanguageModel


def objective_of(config: DistillationConfig) -> dict[str, float]:
    """What a step measures of each label, by the names of metrics, and its weight in what it
    minimizes. The square of the temperature makes up for gradients that shrink with it."""
    if config.weight == 0:
        return {"loss": 1.0}
    return {
        "loss": 1 - config.weight,
        "distillation/divergence": config.weight * config.temperature**2,
        "distillation/teacher_loss": 0.0,
    }


@contextmanager
def teaching(model: LanguageModel) -> Iterator[None]:
    """A block in which passes of the model are its teacher's: all experts on with gates of one, no
    dropout, no gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.all_experts():
            yield
    finally:
        model.train(training)


def compare(
    model: LanguageModel, logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """[3, *labels.shape], in the order of `objective_of`: cross entropy, divergence from the
    teacher, and the teacher's cross entropy. Both logits are the last stage's, and may be
    overwritten. Collective over the tensor group."""
    assert model.head is not None
    divergences = model.head.divergences(logits, teacher, temperature)
    with torch.no_grad():
        teacher_losses = model.losses(teacher, labels)
    return torch.stack((model.losses(logits, labels), divergences, teacher_losses))


class Student(nn.Module):
    """A model of one stage that is asked its teacher first, as one module: ZeRO gathers weights for
    both passes by the hooks of what it is given."""

    def __init__(self, model: LanguageModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(
        self,
        tokens_BS: Tensor,
        labels: Tensor | None = None,
        documents_BS: Tensor | None = None,
        *,
        judged: bool = False,
        memory: DecodingMemory | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As the model's, but of labels in training what `compare` gives."""
        if labels is None or judged:
            return self.model(tokens_BS, labels, documents_BS, judged=judged, memory=memory)
        with teaching(self.model):
            teacher = self.model.stage(tokens_BS, documents_BS)
        logits = self.model.stage(tokens_BS, documents_BS)
        return compare(self.model, logits, teacher, labels, self.temperature)
