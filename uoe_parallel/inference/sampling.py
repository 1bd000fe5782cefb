"""Texts that grow by a token at a time, drawn from what a model says of the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from uoe_parallel.model.decoding import DecodingMemory


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    num_tokens: int
    """That follow a prompt, at most."""
    temperature: float = 1.0
    """Divides logits; 0 takes the likeliest token, the lowest id where several are."""
    top_p: float = 1.0
    """Draw among the likeliest tokens alone, as few as have this probability together (nucleus
    sampling, arXiv 1904.09751)."""


class NextLogits(Protocol):
    """A model with tokens on every rank, asked for the token after each text."""

    def __call__(
        self, tokens_BS: Tensor, documents_BS: Tensor | None, memory: DecodingMemory, /
    ) -> Tensor:
        """Logits [B, V] of the used vocabulary, the same on every rank. Ids int64 that follow those
        of the memory, documents_BS and memory as in `LanguageModel.hidden`."""
        ...


@torch.no_grad()
def sample(
    next_logits: NextLogits,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    context: int,
    by_token: bool,
    device: torch.device,
    ends: Callable[[int, int], bool] = lambda number, token: False,
) -> list[list[int]]:
    """The ids that follow each prompt (of at least one id). Every rank must call this, and all draw
    the same.

    A text depends on its prompt and its seed, not on the others of the batch, but for rounding. The
    model sees at most the last `context` ids: when they are full it begins anew with the latter
    half of them, so that most tokens cost one position. by_token: whether the model can add a
    single token to a memory; otherwise each token costs a whole pass. ends: hears each new id with
    the number of its text, and says whether nothing follows it.
    """
    assert all(len(prompt) > 0 for prompt in prompts) and len(seeds) == len(prompts)
    texts = [list(prompt) for prompt in prompts]
    # What the model sees of each text begins here.
    begins = [max(0, len(text) - context) for text in texts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    growing = list(range(len(texts)))
    memory, rows, seen = DecodingMemory(), growing, 0
    for _ in range(sampling.num_tokens):
        if not growing:
            break
        if memory.is_empty:
            rows = list(growing)
            windows = [texts[number][begins[number] :] for number in rows]
            seen = max(map(len, windows))
        else:  # also of texts that have ended: those of a memory stay together
            windows = [texts[number][-1:] for number in rows]
            seen += 1
        logits_BV = next_logits(*_padded(windows, device), memory).float().cpu()
        for row, number in enumerate(rows):
            if number not in growing:
                continue
            token = _draw(logits_BV[row], sampling, generators[number])
            texts[number].append(token)
            if ends(number, token):
                growing.remove(number)
        if not by_token or seen == context:
            memory = DecodingMemory()
            kept = max(context // 2, 1) if by_token else context
            for number in growing:
                if len(texts[number]) - begins[number] > context:
                    begins[number] = len(texts[number]) - kept
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _padded(windows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids [B, S], and the documents [B, S] where some are padded."""
    length = max(map(len, windows))
    tokens = [[*window, *[0] * (length - len(window))] for window in windows]
    tokens_BS = torch.tensor(tokens, device=device)
    if all(len(window) == length for window in windows):
        return tokens_BS, None
    lengths_B1 = torch.tensor([[len(window)] for window in windows], device=device)
    return tokens_BS, -(torch.arange(length, device=device) >= lengths_B1).long()


def _draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The highest is taken off first: no temperature is so low that it overflows.
    probabilities_V = ((logits_V - logits_V.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered_V, ids_V = probabilities_V.sort(descending=True, stable=True)
        likelier_V = ordered_V.cumsum(0) - ordered_V
        probabilities_V[ids_V[likelier_V >= sampling.top_p]] = 0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
