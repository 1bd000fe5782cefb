"""Tokenizers of subwords from files: Hugging Face tokenizers JSON and SentencePiece models.

Text is text: the name of a special token that stands in it is spelled out, and can neither end a
document nor stand for anything else. Nothing is put before or behind a text.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uoe_parallel.errors import UserError

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""What tokenizers call the token that ends a text, as a document's end is looked for."""

_MOST_OF_A_CHARACTER = 4
"""Bytes of UTF-8, and so tokens, that may be needed for one character."""


class _Subwords(ABC):
    """A tokenizer whose file has `file_size` ids."""

    def __init__(self, path: Path, file_size: int, eod: int | None) -> None:
        """eod: the file's own id; without one, the next after the file's ends a document."""
        self.path = path
        self.size = file_size + (eod is None)
        self.eod = file_size if eod is None else eod

    @property
    @abstractmethod
    def fingerprint(self) -> str: ...

    @abstractmethod
    def encode(self, text: bytes | str) -> NDArray[np.int64]: ...

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """Of ids of the file, none of them `eod`."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, `eod` is left out.

        Raises ValueError for an id outside [0, size).
        """
        kept = [int(i) for i in ids if int(i) != self.eod]
        for token in kept:
            if not 0 <= token < self.size:
                raise ValueError(f"token id {token} is not in range(0, {self.size})")
        return self._text(kept)

    def stream(self) -> SubwordStream:
        """A decoder of one text, token by token."""
        return SubwordStream(self)


class SubwordStream:
    """Text of ids that come one by one, as soon as no later id can change it.

    All pieces together are the text of all ids. (Where these are not UTF-8, the number of U+FFFD
    that stand for the wrong bytes may differ.) It costs the decoding of a few ids for each.
    """

    def __init__(self, tokenizer: _Subwords) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """What the last piece was made of, then what came since: decoders treat the first token of
        a text apart, as where they drop the space before its first word."""
        self._text = ""
        """Of `_ids`."""
        self._given = 0
        """Characters of `_text` that were returned."""
        self._fresh = 0
        """How many of `_ids` came since the last whole piece."""

    def add(self, token: int) -> str:
        """What is certain now that `token` follows; empty in the midst of a character."""
        if token == self._tokenizer.eod:
            return ""
        self._ids.append(token)
        self._fresh += 1
        self._text = self._tokenizer.decode(self._ids)
        if not self._text.endswith("\N{REPLACEMENT CHARACTER}"):
            piece = self._text[self._given :]
            del self._ids[: -self._fresh]
            self._fresh = 0
            self._text = self._tokenizer.decode(self._ids)
            self._given = len(self._text)
            return piece
        # So many tokens would be a whole character: what is before the last sign is not UTF-8.
        if self._fresh >= _MOST_OF_A_CHARACTER:
            return self._take(len(self._text) - 1)
        return ""

    def end(self) -> str:
        """What was held back for a character that did not come to its end."""
        return self._take(len(self._text))

    def _take(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


class HuggingFaceTokenizer(_Subwords):
    """A JSON file of Hugging Face's tokenizers library, whatever its kind.

    Raises UserError if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._content = _read(path)
        try:
            self._tokenizer = Tokenizer.from_buffer(self._content)
        except Exception as error:  # the library raises no other class
            raise UserError(
                f"data.tokenizer: {path} is not a file of the tokenizers library ({error}); name "
                "the tokenizer.json that comes with a model, or make one with "
                "tools/train_tokenizer.py"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"data.tokenizer: {path} has no tokens; name a trained one")
        named = (vocabulary[name] for name in END_OF_TEXT_NAMES if name in vocabulary)
        super().__init__(path, max(vocabulary.values()) + 1, next(named, None))

    @property
    def fingerprint(self) -> str:
        """Of what the file says, however it is laid out. Padding and truncation do not count."""
        tree: dict[str, Any] = json.loads(self._content)
        said = {key: tree[key] for key in tree if key not in ("padding", "truncation")}
        return _fingerprint("tokenizers", json.dumps(said, sort_keys=True).encode())

    def encode(self, text: bytes | str) -> NDArray[np.int64]:
        """Token ids [n] of `text`; bytes that are not UTF-8 count as U+FFFD."""
        encoding = self._tokenizer.encode(_as_text(text), add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int64)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class SentencePieceTokenizer(_Subwords):
    """A model of the SentencePiece library.

    Raises UserError if it cannot be read or the library is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ModuleNotFoundError as error:
            raise UserError(
                f"data.tokenizer: {path} needs the package sentencepiece; install "
                "uoe-parallel[data]"
            ) from error
        self._content = _read(path)
        self._processor: Any = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._content)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"data.tokenizer: {path} is not a SentencePiece model ({error}); copy it again, or "
                "name another"
            ) from error
        eod = self._processor.eos_id()
        super().__init__(path, self._processor.get_piece_size(), eod if eod >= 0 else None)

    @property
    def fingerprint(self) -> str:
        """Of the file."""
        return _fingerprint("sentencepiece", self._content)

    def encode(self, text: bytes | str) -> NDArray[np.int64]:
        """Token ids [n] of `text`; bytes that are not UTF-8 count as U+FFFD."""
        return np.array(self._processor.encode(_as_text(text), out_type=int), dtype=np.int64)

    def _text(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.tokenizer: {path} cannot be read ({error.strerror}); correct the path"
        ) from error


def _as_text(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode("utf-8", errors="replace")


def _fingerprint(kind: str, content: bytes) -> str:
    return f"{kind}-{hashlib.sha256(content).hexdigest()[:32]}"
