"""What keeps experts evenly used and scores small. Sums over sequences, so that shards add up."""

from __future__ import annotations

from torch import Tensor


def load_balance_loss(scores_SBE: Tensor, counts_BE: Tensor, sequence_length: int) -> Tensor:
    """Auxiliary loss of every sequence, summed (Switch Transformer, arXiv 2101.03961, eq. 4).

    n sum_i f_i p_i per sequence, f_i the share of its pairs that expert i took and p_i the mean
    softmax probability of i: 1 when both are even. Gradients flow through p only.

    scores_SBE: fp32, a whole sequence or a shard of it. counts_BE: pairs of each expert over the
    WHOLE sequence, so that the losses of a sequence's shards add up to the loss of the whole.
    """
    counts_BE = counts_BE.to(scores_SBE.dtype)
    share_BE = counts_BE / counts_BE.sum(-1, keepdim=True).clamp(min=1)
    mean_probability_BE = scores_SBE.softmax(-1).sum(0) / sequence_length
    return scores_SBE.shape[-1] * (share_BE * mean_probability_BE).sum()


def z_loss(scores_SBE: Tensor, sequence_length: int) -> Tensor:
    """Squared log-sum-exp of the scores, the mean over each sequence, summed over sequences
    (ST-MoE, arXiv 2202.08906, eq. 5). Shards of a sequence add up as above."""
    return scores_SBE.logsumexp(-1).square().sum() / sequence_length
