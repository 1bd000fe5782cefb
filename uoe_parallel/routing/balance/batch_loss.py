"""The auxiliary loss over all sequences of a micro-batch together."""

from __future__ import annotations

from uoe_parallel.routing.balance.sequence_loss import SequenceLoss


class BatchLoss(SequenceLoss):
    """As `SequenceLoss`, with shares of a whole micro-batch on all data-parallel ranks: a sequence
    may use few experts as long as others use the rest.

    Its value depends on how many sequences that is, micro_batch_size x data-parallel size.
    """

    scope = "batch"
