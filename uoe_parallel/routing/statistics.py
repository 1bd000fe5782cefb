"""Running totals of one routed block, cheap enough to stay on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RoutingStatistics:
    """Sums since the last `reset`, of this rank's own tokens. fp64 on the block's device."""

    counts_E: Tensor
    """Pairs that each expert took."""
    extras: Tensor
    """[tokens, dropped pairs, sequences, balance loss, z-loss], the losses unweighted and summed
    over sequences."""

    @classmethod
    def zeros(cls, num_experts: int) -> RoutingStatistics:
        double = torch.float64
        return cls(torch.zeros(num_experts, dtype=double), torch.zeros(5, dtype=double))

    @torch.no_grad()
    def add(
        self, mask_SBE: Tensor, balance_loss: Tensor, z_loss: Tensor, sequences: float, dropped: int
    ) -> None:
        """Count one forward pass. `sequences` is the share of whole sequences seen here."""
        device = mask_SBE.device
        if self.counts_E.device != device:
            self.counts_E, self.extras = self.counts_E.to(device), self.extras.to(device)
        self.counts_E += mask_SBE.sum((0, 1))
        tokens = mask_SBE.shape[0] * mask_SBE.shape[1]
        self.extras += torch.stack(
            [
                torch.tensor(float(tokens), device=device),
                torch.tensor(float(dropped), device=device),
                torch.tensor(sequences, device=device),
                balance_loss.detach(),
                z_loss.detach(),
            ]
        ).double()

    def pack(self) -> Tensor:
        """One vector, so that all blocks are reduced over ranks in one collective."""
        return torch.cat((self.counts_E, self.extras))

    def reset(self) -> None:
        self.counts_E = torch.zeros_like(self.counts_E)
        self.extras = torch.zeros_like(self.extras)
