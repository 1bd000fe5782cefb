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
    hidden = _relay_hidden(model, tokens_BS, documents_BS, memory)
    return None if hidden is None else model.logits(hidden, documents_BS)


def relay_to_all(
    model: LanguageModel, tokens_BS: Tensor, memory: DecodingMemory | None = None
) -> Tensor:
    """The logits of the used vocabulary [B, S, V] on every rank of the model. Collective as
    `relay`."""
    return _on_all(model, relay(model, tokens_BS, memory=memory), tuple(tokens_BS.shape))


def relay_last_to_all(
    model: LanguageModel, tokens_BS: Tensor, documents_BS: Tensor | None, memory: DecodingMemory
) -> Tensor:
    """The logits of the used vocabulary after the last token of each text, [B, V], on every rank of
    the model. Within `LanguageModel.replicated_tokens`; collective as `relay`."""
    hidden_SBD = _relay_hidden(model, tokens_BS, documents_BS, memory)
    batch, length = tokens_BS.shape
    logits_1BV = None
    if hidden_SBD is not None:
        last_B = torch.full((batch,), length - 1, device=tokens_BS.device)
        if documents_BS is not None:
            last_B = (documents_BS >= 0).sum(1) - 1
        rows_B = torch.arange(batch, device=tokens_BS.device)
        # The head's product is by far the largest of a prompt: one position of each is enough.
        logits_1BV = model.logits(hidden_SBD[last_B, rows_B].unsqueeze(0))
    return _on_all(model, logits_1BV, (batch, 1))[:, 0]


def _relay_hidden(
    model: LanguageModel,
    tokens_BS: Tensor,
    documents_BS: Tensor | None,
    memory: DecodingMemory | None,
) -> Tensor | None:
    """The last stage's hidden states, None elsewhere."""
    groups, x = model.groups, tokens_BS
    if not groups.is_first_stage:
        batch, length = tokens_BS.shape
        shape = (length // model.num_shards, batch, model.hidden_size)
        x = torch.empty(shape, dtype=_dtype(model), device=tokens_BS.device)
        comm.receive(x, groups.stage - 1, groups.pipe, Purpose.STAGE_OUTPUTS)
    hidden = model.hidden(x, documents_BS, memory)
    if groups.is_last_stage:
        return hidden
    comm.send(hidden, groups.stage + 1, groups.pipe, Purpose.STAGE_OUTPUTS)
    return None


def _on_all(model: LanguageModel, logits_SBV: Tensor | None, shape_BS: tuple[int, ...]) -> Tensor:
    """The last stage's logits, whole on every rank of the model."""
    if logits_SBV is not None:
        whole_BSV = model.whole(logits_SBV).contiguous()
    else:
        device = next(model.parameters()).device
        shape = (*shape_BS, model.used_vocab_size)
        whole_BSV = torch.empty(shape, dtype=_dtype(model), device=device)
    pipe = model.groups.pipe
    return comm.broadcast(whole_BSV, pipe.size() - 1, pipe, Purpose.EVALUATION)


def _dtype(model: LanguageModel) -> torch.dtype:
    """Of activations."""
    return next(model.parameters()).dtype
