"""Text sampled from the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uoe_parallel.data.tokenizer import Tokenizer
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.training.engine import TrainingEngine

_PROMPT = "def "
_TOKENS = 200
_TEMPERATURE = 0.7
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def sample_text(engine: TrainingEngine, tokenizer: Tokenizer) -> str:
    """A continuation of a short prompt. Every rank takes part and gets the same text."""
    model, config = engine.model, engine.config
    resets = config.data.reset_at_documents
    # The end of another document comes before the text, unless documents don't see each other.
    before = [] if resets else [tokenizer.eod]
    engine.deepspeed.eval()
    with model.replicated_tokens():
        ids = sample(
            engine.logits,
            [*before, *tokenizer.encode(_PROMPT).tolist()],
            by_token=model.decodes_by_token,
            # What another document begins with, nothing has been trained to say.
            stop=tokenizer.eod if resets else None,
            num_tokens=_TOKENS,
            context=config.model.sequence_length,
            temperature=_TEMPERATURE,
            seed=config.seed,
            device=engine.device,
        )
    engine.deepspeed.train()
    text = _PROMPT + tokenizer.decode(ids)
    # A terminal must not obey what a young model says.
    return "".join(c if c.isprintable() or c == "\n" else _REPLACEMENT for c in text)


@torch.no_grad()
def sample(
    logits_of: Callable[[Tensor, DecodingMemory], Tensor],
    prompt: Sequence[int],
    *,
    by_token: bool,
    stop: int | None = None,
    num_tokens: int,
    context: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> list[int]:
    """At most `num_tokens` ids that follow `prompt` (at least one id).

    logits_of: ids [1, s] that follow those of a memory to logits [1, s, V], the same on every rank,
    with tokens replicated; every rank must call this, and all draw the same ids. The model sees at
    most the last `context` ids: when they are full it begins anew with the latter half of them, so
    that most tokens cost one position. by_token: whether the model can add a single token to a
    memory; otherwise each token costs a whole pass. stop: the id after which nothing follows.
    """
    assert len(prompt) > 0
    ids = list(prompt)
    generator = torch.Generator().manual_seed(seed)
    memory, seen, unseen = DecodingMemory(), 0, ids[-context:]
    for _ in range(num_tokens):
        logits_V = logits_of(torch.tensor([unseen], device=device), memory)[0, -1].float().cpu()
        probabilities = (logits_V / temperature).softmax(-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if ids[-1] == stop:
            break
        seen, unseen = seen + len(unseen), ids[-1:]
        if not by_token or seen == context:
            kept = max(context // 2, 1) if by_token else context
            memory, seen, unseen = DecodingMemory(), 0, ids[-kept:]
    return ids[len(prompt) :]
