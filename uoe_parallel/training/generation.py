"""Text sampled from the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sample(
    logits_of: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    *,
    num_tokens: int,
    context: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> list[int]:
    """`num_tokens` ids that follow `prompt` (at least one id).

    logits_of: ids [1, s] to logits [1, s, V], the same on every rank, with tokens replicated;
    every rank must call this, and all draw the same ids. The model sees the last `context` ids.
    """
    assert len(prompt) > 0
    ids = list(prompt)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        window = torch.tensor([ids[-context:]], device=device)
        logits_V = logits_of(window)[0, -1].float().cpu()
        probabilities = (logits_V / temperature).softmax(-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return ids[len(prompt) :]
