"""Running totals of one routed block, cheap enough to stay on.

Shape suffixes: T tokens, E experts of the block, J experts again, H bins of `GATE_EDGES`, X entries
of the packed totals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GATE_BINS = 30
GATE_EDGES = (*(j / (GATE_BINS - j) for j in range(GATE_BINS)), math.inf)
"""Bins of gates, of equal width in g / (1 + g): fine around 1, where all gates start, and up to 2
(edge 20), where sigmoids end, with room for what softmax and relu give beyond."""

_SCALARS = 5
_EXACT_IN_FP32 = 2**24


class RoutingStatistics:
    """Sums since the last `reset`, of this rank's own tokens. fp64 on the block's device.

    All of them lie in one vector, `totals_X`; the properties are views of it.
    """

    def __init__(self, num_experts: int, totals_X: Tensor | None = None) -> None:
        """`totals_X`: what `pack` gave, maybe summed over ranks; zeros if None."""
        self.num_experts = num_experts
        size = num_experts**2 + num_experts + GATE_BINS + _SCALARS
        self.totals_X = torch.zeros(size, dtype=torch.float64) if totals_X is None else totals_X
        assert self.totals_X.shape == (size,)

    @property
    def together_EJ(self) -> Tensor:
        """Tokens that visited both experts; on the diagonal, all tokens of the expert."""
        return self.totals_X[: self.num_experts**2].view(self.num_experts, -1)

    @property
    def counts_E(self) -> Tensor:
        """Pairs (a token and an expert that it visited) of each expert."""
        return self.together_EJ.diagonal()

    @property
    def dropped_E(self) -> Tensor:
        """Pairs that were chosen and not computed, because the expert had no room."""
        return self.totals_X[-self.num_experts - GATE_BINS - _SCALARS : -GATE_BINS - _SCALARS]

    @property
    def gates_H(self) -> Tensor:
        """Pairs by their gate, in the bins of `GATE_EDGES`."""
        return self.totals_X[-GATE_BINS - _SCALARS : -_SCALARS]

    @property
    def scalars(self) -> Tensor:
        """[tokens, tokens that visited any expert, sequences, balance loss, z-loss]: padding is no
        token; the losses are unweighted and summed over sequences."""
        return self.totals_X[-_SCALARS:]

    @torch.no_grad()
    def add(
        self,
        mask_SBE: Tensor,
        gates_SBE: Tensor,
        dropped_SBE: Tensor | None,
        balance_loss: Tensor,
        z_loss: Tensor,
        sequences: float,
        real_SB: Tensor | None,
    ) -> None:
        """Count one forward pass. The host waits for nothing.

        mask_SBE: bool, the pairs that are computed. gates_SBE: floating, read where the mask is
        set. dropped_SBE: bool, the pairs that were dropped; None if none can be. `sequences`: the
        share of whole sequences seen here. real_SB: bool, False for padding, which has no pairs;
        None if there is none.
        """
        if self.totals_X.device != mask_SBE.device:
            self.totals_X = self.totals_X.to(mask_SBE.device)
        # Not from bool, which torch converts ten times as slowly.
        chosen_TE = mask_SBE.flatten(0, 1).view(torch.uint8).float()
        num_tokens = len(chosen_TE)
        assert num_tokens < _EXACT_IN_FP32
        self.together_EJ.add_(chosen_TE.T @ chosen_TE)
        if dropped_SBE is not None:
            self.dropped_E.add_(dropped_SBE.flatten(0, 1).float().sum(0))
        # All pairs get a bin, the chosen ones a weight: taking these out first would have the host
        # wait for their number.
        place_SBE = (1 + gates_SBE).reciprocal_().mul_(-GATE_BINS).add_(GATE_BINS)
        bins_SBE = place_SBE.long().clamp_(0, GATE_BINS - 1)
        gates_H = torch.zeros(GATE_BINS, device=mask_SBE.device)
        gates_H.scatter_add_(0, bins_SBE.flatten(), chosen_TE.flatten())
        self.gates_H.add_(gates_H)
        for total, value in zip(
            self.scalars.unbind(),
            (
                num_tokens if real_SB is None else real_SB.sum(),
                chosen_TE.sum(-1).count_nonzero(),
                sequences,
                balance_loss,
                z_loss,
            ),
            strict=True,
        ):
            total.add_(value)

    def pack(self) -> Tensor:
        """One vector, so that all blocks are reduced over ranks in one collective."""
        return self.totals_X.clone()

    def reset(self) -> None:
        self.totals_X.zero_()
