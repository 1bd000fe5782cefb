"""Initial weights that depend on the seed and on the parameter's name, and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Initializer:
    """Normal weights from a generator of their own for each parameter.

    Neither the order in which layers are built nor the layout can change them: a layout that
    builds part of the model makes the same full weights and keeps its part.
    """

    seed: int

    def normal(self, name: str, std: float) -> Callable[[Tensor], Tensor]:
        """An init method that fills a full fp32 weight with N(0, std^2)."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") >> 1

        def fill(weight: Tensor) -> Tensor:
            if weight.is_meta:  # nothing to draw, and most of the time that building takes
                return weight
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                return weight.normal_(0.0, std, generator=generator)

        return fill
