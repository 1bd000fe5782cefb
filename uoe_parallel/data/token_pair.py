"""Megatron's .bin/.idx pairs: checked from end to end before they are read, and memory-mapped.

Nothing here grows with a corpus: checks look at a part of the index at a time, and what is read
later is read through the map.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    get_bin_path,
    get_idx_path,
)
from numpy.typing import NDArray

from uoe_parallel.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document boundaries."""
_REMAKE = "build the corpus again, or copy its .bin and .idx again, both of them"
_CHECKED_AT_ONCE = 2**20
"""Entries of the index."""


class Share(NamedTuple):
    """A part of a corpus: the documents whose first token lies in [first, end) of its tokens, where
    0 is the first token of the corpus and 1 the end. Shares that adjoin have no document in common
    and lose none between them."""

    first: float
    end: float


WHOLE = Share(0.0, 1.0)


class TokenPair:
    """The tokens of a pair as one stream, and where documents begin in it.

    Raises UserError, with the file's name, when a file is missing, is damaged, or disagrees with
    the other, or when there are no tokens.
    """

    def __init__(self, prefix: str | Path, least: str) -> None:
        """least: what the corpus has to have, for the message about one that is empty."""
        self.prefix = str(prefix)
        index = _Index.open(Path(get_idx_path(self.prefix)), Path(get_bin_path(self.prefix)))
        self.num_tokens = index.check()
        self.num_documents = len(index.boundaries) - 1
        self._starts, self._boundaries = index.pointers, index.boundaries
        if self.num_tokens == 0:
            raise UserError(f"{self.bin_path}: the corpus is empty; build it from at least {least}")
        self._dataset = IndexedDataset(self.prefix, mmap=True)
        self._dtype = self._dataset.index.dtype
        self._itemsize = np.dtype(self._dtype).itemsize

    @property
    def bin_path(self) -> str:
        return get_bin_path(self.prefix)

    def read(self, first: int, count: int) -> NDArray[np.int64]:
        """`count` tokens from token `first` on: int64 [count], a copy."""
        tokens = self._dataset.bin_reader.read(self._dtype, count, first * self._itemsize)
        # The map is closed with the dataset: a view that outlived it would crash the process.
        return tokens.astype(np.int64, copy=True)

    def bounds(self, documents: range) -> NDArray[np.int64]:
        """Where `documents` (a run of them) begin, and the last one ends, in tokens:
        int64 [documents + 1]."""
        sequences = np.array(self._boundaries[documents.start : documents.stop + 1])
        bounds = np.full(len(sequences), self.num_tokens, dtype=np.int64)
        begins = sequences < len(self._starts)
        bounds[begins] = self._starts[sequences[begins]] // self._itemsize
        return bounds

    def documents_of(self, share: Share) -> range:
        """The documents of a share, by their numbers."""
        return range(self._cut(share.first), self._cut(share.end))

    def _cut(self, place: float) -> int:
        """The first document that begins at `place` of the tokens or later."""
        if place == 1:
            return self.num_documents
        target = place * self.num_tokens
        low, high = 0, self.num_documents
        while low < high:
            middle = (low + high) // 2
            if self.bounds(range(middle, middle))[0] < target:
                low = middle + 1
            else:
                high = middle
        return low


@dataclass(frozen=True)
class _Index:
    """The three arrays of an index, memory-mapped, as its header and its size promise them."""

    path: Path
    bin_path: Path
    itemsize: int
    """Bytes of a token."""
    lengths: NDArray[np.int32]
    """Of sequences, in tokens."""
    pointers: NDArray[np.int64]
    """Where sequences begin in the .bin file, in bytes."""
    boundaries: NDArray[np.int64]
    """The first sequence of each document, and at the end the number of sequences."""

    @staticmethod
    def open(path: Path, bin_path: Path) -> _Index:
        for file in (path, bin_path):
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; a corpus is named by the path of its .bin and .idx "
                    f"files without these endings, here '{path.with_suffix('')}': build the corpus "
                    "or correct the path"
                )
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise _damaged(path, f"{size} bytes are too few for the header of an index")
        magic, version, code, sequences, boundaries = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise _damaged(path, f"begins with {magic!r}, so it is not a megatron index")
        if version != 1:
            raise _damaged(path, f"is of index version {version}, only version 1 is known")
        itemsize = _integer_size(path, code)
        # Per sequence an int32 length and an int64 pointer, per boundary an int64.
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            raise _damaged(path, f"has {size} bytes where its header promises {expected}")
        whole = np.memmap(path, mode="r")[_HEADER.size :]
        first, second = 4 * sequences, 12 * sequences
        return _Index(
            path,
            bin_path,
            itemsize,
            whole[:first].view(np.int32),
            whole[first:second].view(np.int64),
            whole[second:].view(np.int64),
        )

    def check(self) -> int:
        """Number of tokens, after a look at every entry. Raises UserError for a wrong one."""
        tokens = 0
        for start, lengths, pointers in _in_parts(self.lengths, self.pointers):
            ends = tokens + np.cumsum(lengths, dtype=np.int64)
            begins = np.concatenate(([tokens], ends[:-1])) * self.itemsize
            if (wrong := _first(lengths < 0)) is not None:
                what = f"gives sequence {start + wrong} (from 0) a length of {lengths[wrong]}"
                raise _damaged(self.path, what)
            if (wrong := _first(pointers != begins)) is not None:
                what = (
                    f"has sequence {start + wrong} (from 0) begin at byte {pointers[wrong]}, and "
                    f"those before it end at byte {begins[wrong]}"
                )
                raise _damaged(self.path, what)
            tokens = int(ends[-1])
        self._check_boundaries()
        size = self.bin_path.stat().st_size
        if size != tokens * self.itemsize:
            raise _damaged(
                self.bin_path,
                f"has {size} bytes where {self.path.name} promises {tokens * self.itemsize} "
                f"({tokens} tokens of {self.itemsize} bytes)",
            )
        return tokens

    def _check_boundaries(self) -> None:
        sequences, before = len(self.lengths), 0
        if len(self.boundaries) == 0 or self.boundaries[0] != 0:
            raise _damaged(self.path, "has no document that begins with the first sequence")
        for start, boundaries in _in_parts(self.boundaries):
            steps = np.diff(boundaries, prepend=before)
            if (wrong := _first((steps < 0) | (boundaries > sequences))) is not None:
                what = (
                    f"has document {start + wrong} (from 0) begin with sequence "
                    f"{boundaries[wrong]} of {sequences}, and the one before it with "
                    f"{boundaries[wrong] - steps[wrong]}"
                )
                raise _damaged(self.path, what)
            before = int(boundaries[-1])
        if before != sequences:
            what = f"has the last document end after sequence {before} of {sequences}"
            raise _damaged(self.path, what)


def _in_parts(*arrays: NDArray[np.integer]) -> Iterator[tuple[int, *tuple[NDArray, ...]]]:
    """Equal parts of arrays of one length, each with the number of its first entry."""
    for start in range(0, len(arrays[0]), _CHECKED_AT_ONCE):
        yield start, *(array[start : start + _CHECKED_AT_ONCE] for array in arrays)


def _first(wrong: NDArray[np.bool_]) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None


def _integer_size(path: Path, code: int) -> int:
    """Bytes per token of megatron's dtype code."""
    try:
        dtype = np.dtype(DType.dtype_from_code(code))
    except ValueError:
        dtype = None
    if dtype is None or dtype.kind not in "iu":
        raise _damaged(path, f"names dtype code {code}, which is no integer type")
    return dtype.itemsize


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; {_REMAKE}")
