"""How much a chosen expert's result counts.

Every gate is exactly 1 for equal scores of zero, so that a router of zeros with all experts on
leaves the dense block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Gate(Protocol):
    """fp32 (or fp64) scores to gates of the same shape, experts in the last dimension."""

    def __call__(self, scores: Tensor) -> Tensor: ...


class SigmoidGate:
    """2 sigmoid(s): every expert is judged on its own."""

    def __call__(self, scores: Tensor) -> Tensor:
        return 2 * torch.sigmoid(scores)


class SoftmaxGate:
    """n softmax(s) over all n experts, written as exp(s - max) / mean exp(s - max).

    n * softmax(0) would not be exactly 1 for every n in floating point.
    """

    def __call__(self, scores: Tensor) -> Tensor:
        exp = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        return exp / exp.mean(-1, keepdim=True)


GATES: dict[str, Callable[[], Gate]] = {"sigmoid": SigmoidGate, "softmax": SoftmaxGate}
"""By the name in the config."""
