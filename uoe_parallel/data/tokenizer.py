"""Tokenizers: text to token ids and back, found by the name that the config gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uoe_parallel.config.schema import Task
from uoe_parallel.errors import UserError


class Tokenizer(Protocol):
    """What data, model and sampling ask of a tokenizer."""

    @property
    def size(self) -> int:
        """Number of token ids; every id of text is in [0, size).

        The id `size` is free for models that need one which no text has: see `num_model_ids`.
        """
        ...

    @property
    def eod(self) -> int:
        """The id that ends every document."""
        ...

    def encode(self, text: bytes | str) -> NDArray[np.int64]:
        """Token ids [n] of `text`, without an end-of-document id."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, end-of-document ids left out."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8: ids 0 to 255 are the bytes, 256 ends a document."""

    size = 257
    eod = 256

    def encode(self, text: bytes | str) -> NDArray[np.int64]:
        """Token ids [n] of the n bytes of `text`; a str counts as UTF-8."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, `eod` is left out.

        Raises ValueError for an id outside [0, 256].
        """
        data = bytes(int(i) for i in ids if int(i) != self.eod)
        return data.decode("utf-8", errors="replace")


_TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"bytes": ByteTokenizer}


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. Raises UserError for an unknown name."""
    if name not in _TOKENIZERS:
        known = ", ".join(sorted(_TOKENIZERS))
        raise UserError(f"data.tokenizer: {name!r} is not known; choose one of: {known}")
    return _TOKENIZERS[name]()


def num_model_ids(tokenizer: Tokenizer, task: Task) -> int:
    """How many ids a model of `task` reads: those of text, and where it predicts masked tokens one
    more, the last, which takes their place."""
    return tokenizer.size + (task == "masked_token")


def padded_vocab_size(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that holds `size` token ids."""
    assert size > 0 and multiple > 0
    return -(-size // multiple) * multiple
