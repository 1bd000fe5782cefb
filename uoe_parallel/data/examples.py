"""What the tasks make of their data: examples, and micro-batches of them.

Shape suffixes: b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.random import BitGenerator
from numpy.typing import NDArray
from torch import Tensor

from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import Examples, MicroBatch
from uoe_parallel.data.dataset import TokenWindows
from uoe_parallel.data.draws import Draws
from uoe_parallel.data.labelled import LabelledDocuments
from uoe_parallel.data.token_pair import WHOLE, Share
from uoe_parallel.data.tokenizer import Tokenizer, num_model_ids

SHARE_MASKED, SHARE_RANDOM = 0.8, 0.1
"""Of the tokens to predict; the rest is shown as it is."""


class WindowDataset(Protocol):
    """A fixed list of token windows."""

    @property
    def sequence_length(self) -> int: ...

    @property
    def fingerprint(self) -> list[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> NDArray[np.int64]:
        """Window `number`: int64 [sequence_length + 1]."""
        ...


class _Windows:
    """What examples made of windows share."""

    def __init__(self, windows: WindowDataset, *, eod: int, separate_documents: bool) -> None:
        """`eod` is the id that ends a document."""
        self._windows = windows
        self.draws = Draws([len(windows)])
        self._eod = eod
        self._separate = separate_documents

    @property
    def fingerprint(self) -> list[int]:
        return self._windows.fingerprint

    def __len__(self) -> int:
        return len(self._windows)


class NextTokens(_Windows):
    """Windows of which each token predicts the next one."""

    def micro_batch(
        self, numbers: Sequence[int], streams: Sequence[BitGenerator], size: int
    ) -> MicroBatch:
        windows, real = _rows(self._windows, numbers, size)
        tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        counts = real.expand_as(tokens).contiguous()
        if not self._separate:
            return MicroBatch(tokens, labels, counts)
        # After an end of document comes the first token of another one, which nothing that this
        # token may know says anything about.
        counts &= tokens != self._eod
        return MicroBatch(tokens, labels, counts, _document_ids(tokens, self._eod, real))


class MaskedTokens(_Windows):
    """Windows in which some tokens are hidden and to be predicted.

    The recipe of BERT (Devlin et al., arXiv 1810.04805): of the tokens to predict, most are
    replaced by the mask id, some by a random token of text, and some left as they are. Each token
    is one to predict with the same chance, by itself. Ends of documents are not: they are what a
    document is told apart by.
    """

    def __init__(
        self,
        windows: WindowDataset,
        *,
        tokenizer: Tokenizer,
        mask_probability: float,
        separate_documents: bool,
    ) -> None:
        super().__init__(windows, eod=tokenizer.eod, separate_documents=separate_documents)
        self._size = tokenizer.size
        self._mask = num_model_ids(tokenizer, "masked_token") - 1
        self._probability = mask_probability

    def micro_batch(
        self, numbers: Sequence[int], streams: Sequence[BitGenerator], size: int
    ) -> MicroBatch:
        windows, real = _rows(self._windows, numbers, size)
        text = windows[:, :-1].contiguous()
        tokens, chosen = text.clone(), torch.zeros_like(text, dtype=torch.bool)
        for row, stream in enumerate(streams):
            tokens[row], chosen[row] = map(torch.from_numpy, self._hide(text[row].numpy(), stream))
        documents = _document_ids(text, self._eod, real) if self._separate else None
        return MicroBatch(tokens, text, chosen, documents)

    def _hide(
        self, text_s: NDArray[np.int64], stream: BitGenerator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The input that is made of a text, and which of its tokens are to be predicted."""
        words = stream.random_raw(3 * len(text_s)).reshape(3, -1)
        chance_s, kind_s = (words[:2] >> 11) * 2.0**-53  # in [0, 1)
        chosen_s = (chance_s < self._probability) & (text_s != self._eod)
        # Of all ids of text but the end of a document.
        random_s = (words[2] % (self._size - 1)).astype(np.int64)
        random_s += random_s >= self._eod
        shown_s = np.where(kind_s < SHARE_MASKED + SHARE_RANDOM, random_s, text_s)
        shown_s = np.where(kind_s < SHARE_MASKED, self._mask, shown_s)
        return np.where(chosen_s, shown_s, text_s), chosen_s


def open_examples(
    prefix: str, config: RunConfig, tokenizer: Tokenizer, share: Share = WHOLE
) -> Examples:
    """The examples of the config's task in a share of the data at `prefix`.

    Raises UserError if the data can't be read or is not of this task.
    """
    model, separate = config.model, config.data.reset_at_documents
    if model.task == "classification":
        assert model.num_classes is not None
        return LabelledDocuments(prefix, model.sequence_length, model.num_classes, share)
    windows = TokenWindows(prefix, model.sequence_length, share)
    if model.task == "next_token":
        return NextTokens(windows, eod=tokenizer.eod, separate_documents=separate)
    return MaskedTokens(
        windows,
        tokenizer=tokenizer,
        mask_probability=config.data.mask_probability,
        separate_documents=separate,
    )


def _rows(windows: WindowDataset, numbers: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """The windows `numbers` and further rows of zeros, int64 [size, s + 1], and which are which,
    bool [size, 1]."""
    rows = torch.zeros(size, windows.sequence_length + 1, dtype=torch.int64)
    for row, number in enumerate(numbers):
        rows[row] = torch.from_numpy(windows[number])
    return rows, (torch.arange(size) < len(numbers)).unsqueeze(1)


def _document_ids(text: Tensor, eod: int, real: Tensor) -> Tensor:
    """Documents as `MicroBatch.documents` has them, each with the `eod` that ends it."""
    ends = (text == eod).long()
    return torch.where(real, ends.cumsum(1) - ends, -1)
