"""Prompts in, texts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256

from uoe_parallel.data.tokenizer import TextStream
from uoe_parallel.errors import UserError
from uoe_parallel.inference.evaluation import check_predicts_text
from uoe_parallel.inference.opening import OpenedModel
from uoe_parallel.inference.sampling import Sampling, sample


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt."""

    text: str
    tokens: int
    """Drawn, the end of the document among them."""
    ended: bool
    """Whether the document came to its end."""


class _Text:
    """A text while it grows."""

    def __init__(self, stream: TextStream, prompt_ids: Sequence[int]) -> None:
        self.stream = stream
        self.pieces: list[str] = []
        # A decoder treats the first token of a text apart, and this one does not begin here.
        for token in prompt_ids:
            stream.add(token)


def generate(
    opened: OpenedModel,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    batch_size: int = 8,
    all_experts: bool = False,
    begins: bool = True,
    hear: Callable[[int, str], object] = lambda number, piece: None,
    ends: Callable[[str], bool] | None = None,
) -> list[Continuation]:
    """What follows each prompt, up to the end of its document, the same on every rank. Collective
    over all ranks, which have the same prompts.

    A text depends on its prompt and its seed, not on its place or what else is asked for. hear: is
    told pieces of text as they come, with the number of their prompt. With a batch_size of 1, texts
    come one after the other. all_experts: whether every token visits every expert, as in the dense
    model.

    Raises UserError for a model that does not continue text, and for a prompt that it cannot.
    """
    check_predicts_text(opened)
    ids = [_prompt_ids(opened, prompt, begins) for prompt in prompts]
    streams = [_stream_seed(seed, text) for seed, text in zip(seeds, ids, strict=True)]
    texts = [_Text(opened.tokenizer.stream(), prompt_ids) for prompt_ids in ids]

    def give(number: int, piece: str) -> None:
        if piece:
            texts[number].pieces.append(piece)
            hear(number, piece)

    def is_last(number: int, token: int) -> bool:
        give(number, texts[number].stream.add(token))
        is_complete = ends is not None and ends("".join(texts[number].pieces))
        return is_complete or token == opened.tokenizer.eod

    drawn: list[list[int]] = []
    dense = opened.model.all_experts() if all_experts else nullcontext()
    with opened.model.replicated_tokens(), dense:
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            drawn += sample(
                opened.next_logits,
                batch,
                sampling=sampling,
                seeds=streams[start : start + batch_size],
                context=opened.config.model.sequence_length,
                by_token=opened.model.decodes_by_token,
                device=opened.device,
                ends=lambda row, token, first=start: is_last(first + row, token),
            )
            for number in range(start, start + len(batch)):
                give(number, texts[number].stream.end())
    eod = opened.tokenizer.eod
    return [
        Continuation("".join(text.pieces), len(tokens), tokens[-1:] == [eod])
        for text, tokens in zip(texts, drawn, strict=True)
    ]


def _prompt_ids(opened: OpenedModel, prompt: str, begins: bool) -> list[int]:
    """Behind the end of another document where a text begins, unless documents don't see each
    other."""
    ids = opened.tokenizer.encode(prompt).tolist()
    resets = opened.config.data.reset_at_documents
    if not resets and (begins or not ids):
        return [opened.tokenizer.eod, *ids]
    if not ids:
        raise UserError(
            "a prompt is empty: a model of data.reset_at_documents=true has never begun a document "
            "by itself; give its first word"
        )
    return ids


def _stream_seed(seed: int, ids: Sequence[int]) -> int:
    """For texts of other prompts, which would be drawn with the same luck."""
    return int.from_bytes(sha256(f"{seed} {list(ids)}".encode()).digest()[:7])
