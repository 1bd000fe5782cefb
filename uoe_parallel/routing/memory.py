"""Routing one more token of a sequence: what a level remembers of the tokens before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uoe_parallel.routing.level import Decision, Level, UnitScores
from uoe_parallel.routing.units import Units


@dataclass(frozen=True)
class LevelMemory:
    """After some tokens of each of B documents."""

    scores_BE: Tensor
    """Of the unit of the last token."""
    mask_BE: Tensor
    """bool: the experts that this unit visits."""
    chosen_BE: Tensor
    """bool: those that it chose."""
    known_B: Tensor
    """bool: whether there was a summary to judge it by."""
    taken_BE: Tensor
    """int64: units of the document that chose an expert, so far."""
    sums_BE: Tensor
    """Sums of the token scores of the last token's unit."""
    sizes_B: Tensor
    """int64: tokens in these sums."""


def remember(token_scores_SBE: Tensor, decision: Decision, last_B: Tensor) -> LevelMemory:
    """After whole documents, one a sequence. last_B: int64, the place of each one's last token."""
    units = decision.judged.units
    rows_B = torch.arange(len(last_B), device=last_B.device)
    places_S1 = torch.arange(len(token_scores_SBE), device=last_B.device).unsqueeze(1)
    first_B = units.first_SB[last_B, rows_B]
    stands_SB = units.is_first_SB & (places_S1 <= last_B)
    known_SB = decision.judged.known_SB
    return LevelMemory(
        scores_BE=decision.judged.scores_SBE[last_B, rows_B],
        mask_BE=decision.mask_SBE[last_B, rows_B],
        chosen_BE=decision.chosen_SBE[last_B, rows_B],
        known_B=torch.ones_like(last_B, dtype=torch.bool)
        if known_SB is None
        else known_SB[last_B, rows_B],
        taken_BE=(decision.chosen_SBE & stands_SB.unsqueeze(-1)).sum(0),
        sums_BE=units.sums_at_first(token_scores_SBE)[first_B, rows_B],
        sizes_B=last_B - first_B + 1,
    )


def follow(
    level: Level,
    memory: LevelMemory,
    token_scores_BE: Tensor,
    position_B: Tensor,
    allowed_BE: Tensor | None,
    units: Units,
) -> tuple[Decision, LevelMemory]:
    """Decide for the next token of each document, at int64 `position_B` (above 0) in it.

    The decision is of one position. units: of this position, with nothing else around it.
    """
    assert level.selection.per_unit and level.summary != "mean"
    is_new_B1 = (position_B % level.unit_length == 0).unsqueeze(-1)
    if level.summary == "first":
        new_BE, new_known_B = token_scores_BE, torch.ones_like(memory.known_B)
    else:  # what was the last unit is now the one before
        new_BE = memory.sums_BE / memory.sizes_B.unsqueeze(-1)
        new_known_B = position_B >= level.unit_length
    scores_BE = torch.where(is_new_B1, new_BE, memory.scores_BE)
    known_B = torch.where(is_new_B1.squeeze(-1), new_known_B, memory.known_B)
    judged = UnitScores(scores_BE.unsqueeze(0), known_B.unsqueeze(0), units)
    allowed_SBE = None if allowed_BE is None else allowed_BE.unsqueeze(0)
    choosing_SBE = level.choosing_scores(judged, allowed_SBE)
    fresh_BE = level.choose(choosing_SBE, units, judged.known_SB)[0]
    chosen_BE = torch.where(is_new_B1, fresh_BE, memory.chosen_BE)
    taken_BE = memory.taken_BE + (chosen_BE & is_new_B1)
    mask_BE = chosen_BE
    if level.capacity is not None:
        kept_BE = chosen_BE & (taken_BE <= level.capacity.limit)
        mask_BE = torch.where(is_new_B1, kept_BE, memory.mask_BE)
    after = LevelMemory(
        scores_BE=scores_BE,
        mask_BE=mask_BE,
        chosen_BE=chosen_BE,
        known_B=known_B,
        taken_BE=taken_BE,
        sums_BE=torch.where(is_new_B1, 0, memory.sums_BE) + token_scores_BE,
        sizes_B=torch.where(is_new_B1.squeeze(-1), 0, memory.sizes_B) + 1,
    )
    return Decision(judged, choosing_SBE, chosen_BE.unsqueeze(0), mask_BE.unsqueeze(0)), after
