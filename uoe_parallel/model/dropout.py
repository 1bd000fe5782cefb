"""Dropout of hidden states under every layout."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from uoe_parallel.parallel.random import Stream, draw_from


class Dropout(nn.Module):
    """Zeroes elements with `probability` in training and scales the others up.

    Ranks of a tensor group that hold the same tokens drop the same elements, else their hidden
    states would drift apart; with sequence parallelism they hold, and drop, others.
    """

    def __init__(self, probability: float, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.probability = probability
        self.sequence_parallel = sequence_parallel

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S or S/P, B, D] to the same shape."""
        probability = self.probability if self.training else 0.0
        stream = Stream.RANK if self.sequence_parallel else Stream.TENSOR_GROUP
        with draw_from(stream, probability):
            return F.dropout(x_SBD, probability)
