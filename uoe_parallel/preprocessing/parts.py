"""One piece of the sources, read and encoded: a part of the corpus, in files of its own.

A part's name is the hash of all that decides what is in it, so that a part that is there need not
be made again. Its record comes last, and has the checksums of everything else: a part that was not
complete when its maker was killed, or not on the disk when the machine went down, is made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uoe_parallel.data.tokenizer import Tokenizer, build_tokenizer
from uoe_parallel.errors import UserError
from uoe_parallel.preprocessing.pair import HashedFile
from uoe_parallel.preprocessing.sources import SpanReader
from uoe_parallel.preprocessing.spans import Piece, Reading, Span, identity_of

_VERSION = 1
"""Of what this module makes of a piece: parts of another one are not used."""
_TOKENS, _LENGTHS, _BAD, _RECORD = ".tokens", ".lengths", ".bad", ".json"
_NEW = ".new"
_PART_FILE = re.compile(rf"[0-9a-f]{{64}}({_TOKENS}|{_LENGTHS}|{_BAD}|{_RECORD}|{_NEW})")
_END_INSIDE = "text that the tokenizer takes for the end of a document"
_MOST_TOKENS = np.iinfo(np.int32).max
"""Of a document: the index has room for no more."""


@dataclass(frozen=True)
class Recipe:
    """What decides what is in a part, beside its piece."""

    reading: Reading
    tokenizer: str
    """Its name, as `build_tokenizer` knows it."""
    fingerprint: str
    """The tokenizer's."""
    dtype: str
    """Numpy's name of the type of a token."""

    def name_of(self, piece: Piece) -> str:
        """The name of the part that is made of `piece`, 64 characters."""
        spans = [
            [str(span.file.path.resolve()), span.file.format, span.start, span.end, *span.identity]
            for span in piece
        ]
        how = [_VERSION, asdict(self.reading), self.fingerprint, self.dtype]
        return hashlib.sha256(json.dumps([how, spans]).encode()).hexdigest()


@dataclass(frozen=True)
class Counts:
    """What is in a part, or in several of them."""

    documents: int = 0
    tokens: int = 0
    """Ends of documents among them."""
    text_bytes: int = 0
    """Of the documents in UTF-8, without their ends."""
    bad_lines: int = 0
    """Lines or rows that should have been documents and are none."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Part:
    """A part that is whole, and where its files are."""

    folder: Path
    name: str
    was_there: bool
    counts: Counts
    lines: list[int]
    """Of each span: lines or rows."""

    @property
    def tokens_path(self) -> Path:
        """The tokens of all documents, each with the one that ends it, of the recipe's dtype."""
        return self.folder / f"{self.name}{_TOKENS}"

    @property
    def lengths_path(self) -> Path:
        """Numbers of tokens of documents, int32."""
        return self.folder / f"{self.name}{_LENGTHS}"

    def faults(self) -> Iterator[tuple[int, int, str]]:
        """Of each bad line: the number of its span in the piece, its line or row there (from 1)
        and what is wrong with it."""
        with (self.folder / f"{self.name}{_BAD}").open("rb") as stream:
            yield from map(json.loads, stream)


class PartMaker:
    """Makes parts in a folder, which has to be this run's alone."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe = recipe
        self._folder = folder
        self._tokenizer: Tokenizer = build_tokenizer(recipe.tokenizer)

    def make(self, piece: Piece) -> Part:
        """The part of `piece`: the one that is there if it is whole, otherwise a new one.

        Raises UserError for a file that is damaged as a whole, that changed since `piece` was
        cut, or that has a document of more tokens than an index can count.
        """
        name = self._recipe.name_of(piece)
        if (found := _find(self._folder, name)) is not None:
            return found
        lines = list[int]()
        with _PartFiles(self._folder, name) as files:
            for number, span in enumerate(piece):
                reader = SpanReader(span, self._recipe.reading)
                for line, text, fault in reader:
                    ids = None if text is None else self._encode(text, span)
                    if text is not None and ids is not None:
                        files.add(ids, len(text.encode()))
                    else:
                        files.add_bad(number, line, fault or _END_INSIDE)
                lines.append(reader.lines)
                if identity_of(span.file) != span.identity:
                    raise UserError(
                        f"{span.file.path}: changed while it was read; begin again when it is "
                        "complete"
                    )
        part = Part(self._folder, name, was_there=False, counts=files.counts, lines=lines)
        _write_record(part, files.checksums)
        return part

    def _encode(self, text: str, span: Span) -> NDArray[np.integer] | None:
        """The tokens of a document with its end, or None if there is an end within it."""
        ids, eod = self._tokenizer.encode(text), self._tokenizer.eod
        if len(ids) >= _MOST_TOKENS:
            raise UserError(
                f"{span.file.path}: has a document of {len(ids)} tokens, and an index has room for "
                f"{_MOST_TOKENS} with its end; cut it up, a text file by --separator"
            )
        if (ids == eod).any():
            return None
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < self._tokenizer.size)
        return np.append(ids, eod).astype(self._recipe.dtype)


class _PartFiles:
    """The files of a part that is being made."""

    def __init__(self, folder: Path, name: str) -> None:
        self._files = [HashedFile(folder / f"{name}{end}") for end in (_TOKENS, _LENGTHS, _BAD)]
        self._tokens, self._lengths, self._bad = self._files
        self._lengths_so_far = array("i")
        self._text_bytes = self._bad_lines = 0

    def __enter__(self) -> _PartFiles:
        return self

    def __exit__(self, *raised: object) -> None:
        self._lengths.write(self._lengths_so_far.tobytes())
        for file in self._files:
            file.close()

    def add(self, ids: NDArray[np.integer], text_bytes: int) -> None:
        """A document with its end, of so many bytes of text."""
        self._tokens.write(ids.data)
        self._lengths_so_far.append(len(ids))
        self._text_bytes += text_bytes

    def add_bad(self, span: int, line: int, fault: str) -> None:
        self._bad.write(json.dumps([span, line, fault]).encode() + b"\n")
        self._bad_lines += 1

    @property
    def counts(self) -> Counts:
        return Counts(
            documents=len(self._lengths_so_far),
            tokens=sum(self._lengths_so_far),
            text_bytes=self._text_bytes,
            bad_lines=self._bad_lines,
        )

    @property
    def checksums(self) -> list[str]:
        """Of closed files."""
        return [file.sha256 for file in self._files]


def remove_parts(folder: Path) -> None:
    """Remove the parts in a folder, of whatever run, and nothing else."""
    for path in folder.iterdir():
        if _PART_FILE.fullmatch(path.name):
            path.unlink()


def _find(folder: Path, name: str) -> Part | None:
    """The part of this name if it is there, every byte of it as it was written."""
    try:
        record = json.loads((folder / f"{name}{_RECORD}").read_bytes())
        for ending, expected in zip((_TOKENS, _LENGTHS, _BAD), record["sha256"], strict=True):
            with (folder / f"{name}{ending}").open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                    return None
    except (FileNotFoundError, ValueError):
        return None
    counts = Counts(**record["counts"])
    return Part(folder, name, was_there=True, counts=counts, lines=record["lines"])


def _write_record(part: Part, checksums: list[str]) -> None:
    record = {"counts": asdict(part.counts), "lines": part.lines, "sha256": checksums}
    path = part.folder / f"{part.name}{_RECORD}"
    new = path.with_suffix(_NEW)
    new.write_text(json.dumps(record), "utf-8")
    new.replace(path)
