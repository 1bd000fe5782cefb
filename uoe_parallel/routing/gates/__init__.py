"""How much a chosen expert's result counts: one class in each file, by the names in
`config/rules.py`.

Every gate is exactly 1 for equal scores of zero, so that a router of zeros with all experts on
leaves the dense block.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Gate(Protocol):
    """fp32 (or fp64) scores [S, B, E] and the bool mask of the chosen experts to gates of the same
    shape, which count where the mask is set. Built as `rule(config, num_experts)`."""

    def __call__(self, scores_SBE: Tensor, mask_SBE: Tensor) -> Tensor: ...
