"""What the last stage makes of hidden states: logits, losses, and which predictions are right.

Shape suffixes, beside those of the package: V ids of the vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.experts.slices import InitMethod
from uoe_parallel.model.divergence import vocab_parallel_divergence
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose, labelled


class _ParallelLogits(ColumnParallelLinear):
    """Megatron's, whose collectives have a name."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        assert isinstance(self.tp_group, ProcessGroup)
        return labelled(Purpose.HEAD, self.tp_group, super().forward, *args, **kwargs)


_PADDING_LOGIT = -1e4
"""Far below every other, and finite: a softmax gives it exactly zero in fp32 and fp64."""


class VocabularyHead(nn.Module):
    """A token at every position: logits [S, B, V/P] of this rank's part of the vocabulary.

    Ids from `used_vocab_size` on only fill the vocabulary up, and have no part in any softmax.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        used_vocab_size: int,
        *,
        tied: bool,
        config: ModelParallelConfig,
        init: InitMethod,
        group: ProcessGroup,
    ) -> None:
        super().__init__()
        self.used_vocab_size = used_vocab_size
        self.tied = tied
        self.group = group
        self.logits = _ParallelLogits(
            hidden_size,
            vocab_size,
            config=config,
            init_method=init,
            bias=False,
            skip_weight_param_allocation=tied,
            tp_group=group,
        )

    def forward(self, x_SBD: Tensor, embedding: VocabParallelEmbedding | None = None) -> Tensor:
        """`embedding` is asked for its weight where the two are tied."""
        # That is done here, inside the module that uses it: ZeRO 3 gathers it for this forward
        # and backward pass then, and not for longer.
        assert self.tied == (embedding is not None)
        weight = embedding.weight if embedding is not None else None
        logits_SBV = self.logits(x_SBD, weight=weight)[0]
        # Trained models push padding down by themselves. A converted one has no weights for it, and
        # logits of zero outweigh those of ids with a meaning where all of these are far below.
        # Detached: what a softmax gives no share has no gradient either.
        used = max(self.used_vocab_size - self.group.rank() * logits_SBV.shape[-1], 0)
        logits_SBV.detach()[..., used:].fill_(_PADDING_LOGIT)
        return logits_SBV

    def losses(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross entropy of every token, nats [B, S], fp32 (fp64 of fp64 logits), the same on every
        rank of the tensor group. Megatron overwrites fp32 logits."""
        labels_SB = labels_BS.transpose(0, 1).contiguous()
        if logits_SBV.dtype is torch.float64:  # which Megatron's would round
            whole_SBV = comm.gather_last_dim(logits_SBV, self.group, Purpose.LOSS)
            return F.cross_entropy(whole_SBV.permute(1, 2, 0), labels_BS, reduction="none")
        losses_SB = labelled(
            Purpose.LOSS, self.group, vocab_parallel_cross_entropy, logits_SBV, labels_SB
        )
        return losses_SB.transpose(0, 1)

    def divergences(self, logits_SBV: Tensor, teacher_SBV: Tensor, temperature: float) -> Tensor:
        """KL of every token from a teacher's prediction, as `vocab_parallel_divergence`, [B, S]."""
        divergences_SB = vocab_parallel_divergence(logits_SBV, teacher_SBV, temperature, self.group)
        return divergences_SB.transpose(0, 1)

    @torch.no_grad()
    def correct(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """Whether the label has the highest logit: bool [B, S], the same on every rank of the
        tensor group."""
        own = logits_SBV.max(-1)
        highest_SB = comm.max_over(own.values, self.group, purpose=Purpose.EVALUATION)
        first = self.group.rank() * logits_SBV.shape[-1]
        # Of ranks that tie, the last one's: one guess, whatever the logits.
        guess_SB = torch.where(own.values == highest_SB, own.indices + first, -1)
        guess_SB = comm.max_over(guess_SB, self.group, purpose=Purpose.EVALUATION)
        return guess_SB.transpose(0, 1) == labels_BS

    def whole(self, logits_SBV: Tensor) -> Tensor:
        """The logits of the used vocabulary [B, S, V] on every rank of the tensor group."""
        logits_SBV = comm.gather_last_dim(logits_SBV, self.group, Purpose.EVALUATION)
        return logits_SBV[..., : self.used_vocab_size].transpose(0, 1)


class ClassHead(nn.Module):
    """A class for every sequence: a linear layer of the mean hidden state of its real tokens.

    Logits are fp32 (fp64 of fp64 hidden states), [B, C], whole and the same on every rank of the
    tensor group, as are the parameters. What these meet is summed over the sequence's shards
    before, so every rank computes the whole of their gradients, and nothing is left to sum.
    """

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        *,
        dtype: torch.dtype,
        init: InitMethod,
        group: ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        weight = torch.empty(num_classes, hidden_size)
        init(weight)
        self.weight = nn.Parameter(weight.to(dtype))
        self.bias = nn.Parameter(torch.zeros(num_classes, dtype=dtype))
        self.group = group
        self.sequence_parallel = sequence_parallel

    def forward(self, x_SBD: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """x_SBD: [S or S/P, B, D]. documents_BS: int64, negative for padding, None if there is
        none. A sequence of nothing but padding has the mean 0."""
        shards = self.group.size() if self.sequence_parallel else 1
        if documents_BS is None:
            documents_BS = x_SBD.new_zeros(x_SBD.shape[1], x_SBD.shape[0] * shards)
        real_SB = (documents_BS >= 0).transpose(0, 1)
        count_B1 = real_SB.sum(0).clamp(min=1).unsqueeze(-1)
        precise = torch.promote_types(x_SBD.dtype, torch.float32)
        own_SB1 = real_SB.chunk(shards)[self.group.rank() if shards > 1 else 0].unsqueeze(-1)
        sum_BD = x_SBD.to(precise).masked_fill(~own_SB1, 0).sum(0)
        if shards > 1:
            # Its backward pass hands every rank the gradient of the sum, which each has whole.
            sum_BD = comm.sum_forward(sum_BD, self.group, Purpose.HEAD)
        return F.linear(sum_BD / count_B1, self.weight.to(precise), self.bias.to(precise))

    def losses(self, logits_BC: Tensor, labels_B1: Tensor) -> Tensor:
        """Cross entropy of every sequence, nats [B, 1]."""
        return F.cross_entropy(logits_BC, labels_B1.squeeze(1), reduction="none").unsqueeze(1)

    def divergences(self, logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
        """KL of every sequence from a teacher's prediction, nats [B, 1]."""
        student_BC, teacher_BC = (
            F.log_softmax(x_BC / temperature, dim=-1) for x_BC in (logits_BC, teacher_BC)
        )
        divergences_BC = F.kl_div(student_BC, teacher_BC, reduction="none", log_target=True)
        return divergences_BC.sum(1, keepdim=True)

    def correct(self, logits_BC: Tensor, labels_B1: Tensor) -> Tensor:
        """Whether the label has the highest logit: bool [B, 1]."""
        return logits_BC.argmax(1, keepdim=True) == labels_B1

    def whole(self, logits_BC: Tensor) -> Tensor:
        """As they are."""
        return logits_BC
