"""What layers need to know of a micro-batch beside its hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uoe_parallel.experts.cache import KeyValueCache
from uoe_parallel.experts.documents import Documents
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose


@dataclass(frozen=True)
class Context:
    """The same for all layers of a stage, and on all ranks of a tensor group."""

    documents: Documents
    """Of this rank's own sequences."""
    expert_group: Documents
    """Of all sequences whose tokens meet in an expert group, in the order of its ranks: the same
    object where that is the tensor group."""
    memory: DecodingMemory | None = None
    """What was computed of the tokens before, while text is decoded."""

    def cache_of(self, block: nn.Module) -> KeyValueCache | None:
        """The keys and values that a block keeps, while text is decoded."""
        return None if self.memory is None else self.memory.of(block).cache


def micro_batch_context(
    shape_BS: tuple[int, int],
    documents_BS: Tensor | None,
    groups: ParallelGroups,
    device: torch.device,
    memory: DecodingMemory | None = None,
) -> Context:
    """Of B sequences of S tokens; documents_BS as `Documents.from_ids` takes them, None for one a
    sequence. Collective over a wide expert group if there are documents and no memory."""
    batch, length = shape_BS
    whole = documents_BS is None
    own = Documents.whole(length, batch, device) if whole else Documents.from_ids(documents_BS)
    runs = groups.expert.size() // groups.tensor.size()
    if runs == 1 or memory is not None:  # text is decoded with its tokens on every rank
        return Context(own, own, memory)
    if documents_BS is None:
        return Context(own, Documents.whole(length, runs * batch, device))
    # Tensor ranks hold the same sequences: one of each run is enough.
    gathered = comm.gather_shards(documents_BS, 0, groups.expert, Purpose.DOCUMENTS)
    of_runs = gathered.unflatten(0, (runs, groups.tensor.size(), batch))[:, 0].flatten(0, 1)
    return Context(own, Documents.from_ids(of_runs))
