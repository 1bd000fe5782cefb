"""One decision of a routed block: which experts its units of one size visit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from uoe_parallel.experts.documents import Documents
from uoe_parallel.routing.balance import BalanceRule
from uoe_parallel.routing.capacity import Capacity
from uoe_parallel.routing.gates import Gate
from uoe_parallel.routing.running import Running
from uoe_parallel.routing.selection import Selection
from uoe_parallel.routing.units import Units

Summary = Literal["first", "mean", "previous_mean"]


@dataclass(frozen=True)
class UnitScores:
    """What the tokens of some positions are judged by."""

    scores_SBE: Tensor
    """fp32 (or fp64): the scores of each token's unit. Zero where nothing is known."""
    known_SB: Tensor | None
    """bool: whether there is a summary to judge by; None if there always is."""
    units: Units

    @property
    def counted_SB(self) -> Tensor:
        """bool: the tokens that stand for a unit each, of those that were judged."""
        first_SB = self.units.is_first_SB
        return first_SB if self.known_SB is None else first_SB & self.known_SB

    def at(self, positions: slice) -> UnitScores:
        """Those of a part of the positions."""
        known_SB = None if self.known_SB is None else self.known_SB[positions]
        return UnitScores(self.scores_SBE[positions], known_SB, self.units.at(positions))


class Level:
    """The rules for units of one size. They know scores only: no groups, no experts.

    Scores of a unit are those of its summary: its first token, its mean, or the mean of the unit
    before it. Scores are linear in hidden states, so the mean of scores is the score of the mean.
    """

    def __init__(
        self,
        *,
        unit_length: int,
        summary: Summary,
        selection: Selection,
        gate: Gate,
        balance: list[BalanceRule],
        capacity: Capacity | None,
    ) -> None:
        self.unit_length = unit_length
        self.summary: Summary = summary
        self.selection = selection
        self.gate = gate
        self.balance = balance
        self.capacity = capacity

    @property
    def running(self) -> list[Running]:
        """The rules that move between steps."""
        rules: list[object] = [self.selection, *self.balance]
        return [rule for rule in rules if isinstance(rule, Running)]

    @property
    def chooses_by_unit(self) -> bool:
        """Whether a unit's choice needs no scores but its own."""
        return self.selection.per_unit and self.capacity is None

    def scores_lie_within(self, units: Units, shard_length: int) -> bool:
        """Whether the scores of a shard's units need the tokens of that shard alone."""
        return self.summary != "previous_mean" and units.lie_within(shard_length)

    def units(self, documents: Documents) -> Units:
        return Units.of(documents, self.unit_length)

    def summarise(self, token_scores_SBE: Tensor, units: Units) -> UnitScores:
        """From scores of single tokens. Differentiable."""
        if self.summary == "first":
            return UnitScores(units.first_of(token_scores_SBE), None, units)
        if self.summary == "mean":
            return UnitScores(units.mean_of(token_scores_SBE), None, units)
        return UnitScores(*units.mean_of_previous(token_scores_SBE), units)

    def choosing_scores(self, judged: UnitScores, allowed_SBE: Tensor | None) -> Tensor:
        """What experts are chosen by: without gradients, -inf for those that are not allowed."""
        scores_SBE = judged.scores_SBE.detach()
        for rule in self.balance:
            offset_E = rule.offset()
            if offset_E is not None:
                scores_SBE = scores_SBE + offset_E.to(scores_SBE)
        if allowed_SBE is None:
            return scores_SBE
        return scores_SBE.masked_fill(~allowed_SBE, -torch.inf)

    def choose(self, choosing_SBE: Tensor, units: Units, known_SB: Tensor | None) -> Tensor:
        """The choice before capacity. A unit of which nothing is known takes all there is."""
        chosen_SBE = self.selection(choosing_SBE, units)
        if known_SB is not None:
            chosen_SBE = chosen_SBE | ~known_SB.unsqueeze(-1)
        return chosen_SBE & (choosing_SBE > -torch.inf)

    def limit(self, chosen_SBE: Tensor, units: Units) -> Tensor:
        """What capacity leaves of a choice of whole sequences."""
        return chosen_SBE if self.capacity is None else self.capacity(chosen_SBE, units)

    def units_per_sequence(self, units: Units) -> Tensor:
        """How many units of whole sequences are judged: fp32 [B], at least 1."""
        counted_SB = units.is_first_SB
        if self.summary == "previous_mean":
            counted_SB = counted_SB & (units.number_in_document_SB > 0)
        return counted_SB.sum(0).clamp(min=1).float()


@dataclass(frozen=True)
class Decision:
    """What a level decided for some positions."""

    judged: UnitScores
    choosing_SBE: Tensor
    """What experts were chosen by, without gradients."""
    chosen_SBE: Tensor
    """bool: the choice before capacity."""
    mask_SBE: Tensor
    """bool: what is left of it."""
