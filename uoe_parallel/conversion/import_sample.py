"""Sample text for an import: what shows which neurons and experts a token needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uoe_parallel.data.tokenizer import Tokenizer
from uoe_parallel.errors import UserError

LONGEST_WINDOW = 512
"""Tokens: more of other texts tells more than more of one."""
_BATCH_TOKENS = 2048
"""Tokens of a forward pass."""
_BYTES_PER_TOKEN = 8
"""No tokenizer of text makes more of them in the mean."""
_HELD_OUT = 8
"""One window in so many."""


@dataclass(frozen=True)
class Sample:
    """Windows of text, int64 [B, S] each, all of one length S."""

    studied: list[Tensor]
    """What slices and routers are made by."""
    held_out: list[Tensor]
    """What the result is judged by."""

    @property
    def num_tokens(self) -> int:
        return sum(tokens_BS.numel() for tokens_BS in (*self.studied, *self.held_out))


def read_sample(
    files: Sequence[Path], tokenizer: Tokenizer, num_tokens: int, context: int
) -> Sample:
    """About `num_tokens` tokens from the beginnings of the files, in equal parts, cut into windows
    of `context` tokens or less. Raises UserError for what cannot be read or is too little."""
    share = num_tokens * _BYTES_PER_TOKEN // len(files)
    parts: list[np.ndarray] = []
    for file in files:
        try:
            with file.open("rb") as stream:
                text = stream.read(share).decode("utf-8", errors="ignore")
        except OSError as error:
            raise UserError(f"--text {file}: {error.strerror}; name files of text") from error
        parts += [tokenizer.encode(text)[: num_tokens // len(files)], np.array([tokenizer.eod])]
    tokens = torch.from_numpy(np.concatenate(parts))
    length = min(context, LONGEST_WINDOW)
    windows_NS = tokens[: len(tokens) // length * length].view(-1, length)
    if len(windows_NS) < 2:
        raise UserError(
            f"--text: {len(tokens)} tokens are too few, at least {2 * length} are needed, two "
            "windows, and some ten thousand to tell anything"
        )
    held_N = torch.arange(len(windows_NS)) % _HELD_OUT == 1
    batch = max(_BATCH_TOKENS // length, 1)
    return Sample(
        studied=list(windows_NS[~held_N].split(batch)),
        held_out=list(windows_NS[held_N].split(batch)),
    )
