"""A forward pass over the pipeline's stages, without gradients and with no schedule of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose


def relay(
    model: LanguageModel,
    tokens_BS: Tensor,
    documents_BS: Tensor | None = None,
    memory: DecodingMemory | None = None,
) -> Tensor | None:
    """The last stage's logits as `LanguageModel.stage` has them, None elsewhere. documents_BS,
    memory: as in `LanguageModel.hidden`. Collective over a pipeline group, and what the layers are
    collective over. Passes that follow each other overlap."""
    groups, x = model.groups, tokens_BS
    if not groups.is_first_stage:
        batch, length = tokens_BS.shape
        shape = (length // model.num_shards, batch, model.hidden_size)
        x = torch.empty(shape, dtype=_dtype(model), device=tokens_BS.device)
        comm.receive(x, groups.stage - 1, groups.pipe, Purpose.STAGE_OUTPUTS)
    y = model.stage(x, documents_BS, memory)
    if groups.is_last_stage:
        return y
    comm.send(y, groups.stage + 1, groups.pipe, Purpose.STAGE_OUTPUTS)
    return None


def relay_to_all(
    model: LanguageModel, tokens_BS: Tensor, memory: DecodingMemory | None = None
) -> Tensor:
    """The logits of the used vocabulary [B, S, V] on every rank of the model. Collective as
    `relay`."""
    logits_SBV = relay(model, tokens_BS, memory=memory)
    if logits_SBV is not None:
        whole_BSV = model.whole(logits_SBV).contiguous()
    else:
        shape = (*tokens_BS.shape, model.used_vocab_size)
        whole_BSV = torch.empty(shape, dtype=_dtype(model), device=tokens_BS.device)
    pipe = model.groups.pipe
    return comm.broadcast(whole_BSV, pipe.size() - 1, pipe, Purpose.EVALUATION)


def _dtype(model: LanguageModel) -> torch.dtype:
    """Of activations."""
    return next(model.parameters()).dtype
