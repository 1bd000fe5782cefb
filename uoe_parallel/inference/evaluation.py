"""How well a model predicts texts, in units that do not depend on its tokenizer as well."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uoe_parallel.errors import UserError
from uoe_parallel.inference.opening import OpenedModel
from uoe_parallel.inference.scoring import Window, score, sliding_windows


@dataclass(frozen=True)
class TextScore:
    """How well a text, or several, were predicted."""

    nats: float
    """Minus the log-likelihood of all tokens."""
    tokens: int
    bytes: int
    """Of UTF-8."""
    words: int
    """What white space separates, counted as lm-evaluation-harness does."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def values(self) -> dict[str, float]:
        """What is reported of it, by name."""
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "loss": self.loss,
            "perplexity": _exp(self.loss),
            "bits_per_byte": self.nats / self.bytes / math.log(2),
            "word_perplexity": _exp(self.nats / self.words),
        }

    @classmethod
    def total(cls, scores: Sequence[TextScore]) -> TextScore:
        """Of all texts together."""
        return cls(
            *(
                sum(getattr(score, name) for score in scores)
                for name in ("nats", "tokens", "bytes", "words")
            )
        )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def check_predicts_text(opened: OpenedModel) -> None:
    """Raises UserError if the model does not go from each token to the next."""
    task = opened.config.model.task
    if task != "next_token":
        raise UserError(
            f"model.task={task}: only a model of next_token predicts text from left to right; "
            "name a run of that task"
        )


def reading_window(opened: OpenedModel, window: int | None, stride: int | None) -> tuple[int, int]:
    """The window and stride to read text with: by default the model's sequence length, and half a
    window. Raises UserError for sizes that do not fit."""
    longest = opened.config.model.sequence_length
    window = longest if window is None else window
    if not 0 < window <= longest:
        raise UserError(
            f"window {window}: the model reads 1 to model.sequence_length={longest} tokens at once"
        )
    stride = max(window // 2, 1) if stride is None else stride
    if not 0 < stride <= window:
        raise UserError(f"stride {stride}: choose 1 to window={window} tokens")
    return window, stride


@dataclass(frozen=True)
class Reading:
    """A text as windows, in which each of its tokens counts once."""

    windows: Sequence[Window]
    tokens: int
    nats_ahead: float
    """Of the first token, where no window counts it."""


def read_ids(
    opened: OpenedModel,
    ids: NDArray[np.int64],
    before: Sequence[int] = (),
    *,
    window: int,
    stride: int,
) -> Reading:
    """What counts is `ids`, which follow those `before` in a document.

    The first token of a document is predicted from the end of another one. A model that keeps
    documents apart has never been asked to do so: to it, every id is as likely.
    """
    nats_ahead, before = 0.0, list(before)
    if not before and not opened.config.data.reset_at_documents:
        before = [opened.tokenizer.eod]
    elif not before and len(ids) > 0:
        nats_ahead = math.log(opened.model.used_vocab_size)
    followed = np.concatenate((np.array(before, dtype=np.int64), ids))
    first = max(len(before), 1)
    windows = list(sliding_windows(followed, first, window=window, stride=stride))
    return Reading(windows, len(ids), nats_ahead)


def evaluate_texts(
    opened: OpenedModel,
    texts: Mapping[str, str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    all_experts: bool = False,
    progress: Callable[[int], Callable[[int], object]] = lambda total: lambda done: None,
) -> dict[str, TextScore]:
    """Each text by its name, the same on every rank. Collective over all ranks, which have the same
    texts.

    window, stride: tokens, as in `reading_window`. batch_size: windows of a micro-batch, by default
    training.micro_batch_size. all_experts: whether every token visits every expert, as in the dense
    model. progress: is told the number of windows, and what it returns how many more are done.

    Raises UserError for a model or sizes that do not fit, and a text without a token.
    """
    check_predicts_text(opened)
    window, stride = reading_window(opened, window, stride)
    readings = {
        name: read_ids(opened, opened.tokenizer.encode(text), window=window, stride=stride)
        for name, text in texts.items()
    }
    if empty := [name for name, reading in readings.items() if reading.tokens == 0]:
        raise UserError(f"{empty[0]} has no text; leave it out")
    windows = [w for reading in readings.values() for w in reading.windows]
    with opened.model.all_experts() if all_experts else nullcontext():
        scores = score(
            opened,
            windows,
            batch_size=batch_size or opened.config.training.micro_batch_size,
            advance=progress(len(windows)),
        )
    parts = scores.nats_W.split([len(reading.windows) for reading in readings.values()])
    return {
        name: TextScore(
            reading.nats_ahead + float(nats.sum()),
            reading.tokens,
            len(texts[name].encode()),
            len(re.split(r"\s+", texts[name])),
        )
        for (name, reading), nats in zip(readings.items(), parts, strict=True)
    }
