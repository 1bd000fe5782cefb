"""Tokenizers: text to token ids and back, found by the name that the config gives."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uoe_parallel.config.schema import Task
from uoe_parallel.data.subwords import HuggingFaceTokenizer, SentencePieceTokenizer
from uoe_parallel.errors import UserError


class TextStream(Protocol):
    """Decodes one text while its ids come one by one, and never splits a character."""

    def add(self, token: int, /) -> str:
        """The text that is certain now that `token` follows; it may be empty."""
        ...

    def end(self) -> str:
        """What is left when no further token comes."""
        ...


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

    @property
    def fingerprint(self) -> str:
        """Differs between tokenizers that differ, wherever their files are."""
        ...

    def encode(self, text: bytes | str) -> NDArray[np.int64]:
        """Token ids [n] of `text`, without an end-of-document id."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, end-of-document ids left out."""
        ...

    def stream(self) -> TextStream:
        """A decoder of one text, token by token."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8: ids 0 to 255 are the bytes, 256 ends a document."""

    size = 257
    eod = 256
    fingerprint = "bytes"

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

    def stream(self) -> ByteStream:
        """A decoder of one text, byte by byte."""
        return ByteStream()


class ByteStream:
    """The text of bytes that come one by one, `ByteTokenizer.eod` left out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The character that ends with this byte, if one does."""
        return "" if token == ByteTokenizer.eod else self._decoder.decode(bytes([token]))

    def end(self) -> str:
        """U+FFFD if a character was not ended."""
        return self._decoder.decode(b"", final=True)


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes", or a file, which is found by its ending.

    Raises UserError for an unknown name and for a file that cannot be read.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise UserError(
        f'data.tokenizer: {name!r} is not known; use "bytes", a file of the tokenizers library '
        "(.json) or a SentencePiece model (.model)"
    )


def num_model_ids(tokenizer: Tokenizer, task: Task) -> int:
    """How many ids a model of `task` reads: those of text, and where it predicts masked tokens one
    more, the last, which takes their place."""
    return tokenizer.size + (task == "masked_token")


def padded_vocab_size(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that holds `size` token ids."""
    assert size > 0 and multiple > 0
    return -(-size // multiple) * multiple
