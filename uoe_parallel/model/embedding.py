"""Where token ids become hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.experts.documents import Documents
from uoe_parallel.model.dropout import Dropout
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose, labelled

Init = Callable[[Tensor], Tensor]


class _ParallelEmbedding(VocabParallelEmbedding):
    """Megatron's, whose collectives have a name."""

    def forward(self, input_: Tensor) -> Tensor:
        assert isinstance(self.tp_group, ProcessGroup)
        return labelled(Purpose.EMBEDDING, self.tp_group, super().forward, input_)


class Embedding(nn.Module):
    """Token ids [B, S] to hidden states [S or S/P, B, D], the vocabulary cut over the group.

    With `positions_init`, one of `length` learned vectors is added to each, by the token's place in
    its document. They are whole on every rank.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        init: Init,
        length: int,
        positions_init: Init | None,
        dropout: Dropout,
        config: ModelParallelConfig,
        group: ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.tokens = _ParallelEmbedding(
            vocab_size, hidden_size, init_method=init, config=config, tp_group=group
        )
        self.positions: nn.Parameter | None = None
        if positions_init is not None:
            positions = positions_init(torch.empty(length, hidden_size))
            self.positions = nn.Parameter(positions.to(dtype))
        self.dropout = dropout

    def forward(self, tokens_BS: Tensor, documents: Documents) -> Tensor:
        """documents: of the sequences; with learned positions none is longer than these."""
        self.tokens.reduce_scatter_embeddings = self.sequence_parallel
        hidden = self.tokens(tokens_BS)
        hidden = hidden if self.sequence_parallel else hidden.transpose(0, 1).contiguous()
        if self.positions is not None:
            hidden = hidden + self._of_places(self.positions, documents)
        return self.dropout(hidden)

    def _of_places(self, positions: Tensor, documents: Documents) -> Tensor:
        """Vectors of this rank's tokens: [S or S/P, B, D], or [.., 1, D] for all sequences."""
        place_SB = documents.position_SB
        if self.sequence_parallel:
            positions = comm.sum_gradient(positions, self.group, Purpose.REPLICATED_WEIGHTS)
            place_SB = place_SB[documents.shard(self.group.rank(), self.group.size())]
        if documents.one_each:
            place_SB = place_SB[:, :1]
        return F.embedding(place_SB, positions)
