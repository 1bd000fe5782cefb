"""Megatron's .bin/.idx pairs, joined from files of tokens and lengths.

Byte for byte what megatron-core's IndexedDatasetBuilder writes when each document is one item. The
builder keeps an object or more for every document, which is more than the memory of a machine where
there are billions of them; here it is one part's lengths at a time. It also comes with torch, which
takes seconds to import, in every process.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of items, number of boundaries of documents."""
_MAGIC, _INDEX_VERSION = b"MMIDIDX\x00\x00", 1
_CODES = {"uint16": 8, "int32": 4}
_AT_ONCE = 2**20


class TokensAndLengths(NamedTuple):
    """Documents in files: their tokens, one after the other, and how many each has, int32."""

    tokens: Path
    lengths: Path


class HashedFile:
    """A file to write, and the SHA-256 of what it is given."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def close(self) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def dtype_for(num_ids: int) -> str:
    """The type of tokens in [0, num_ids), by Megatron's own rule."""
    return "uint16" if num_ids < 65500 else "int32"


def join(
    parts: Sequence[TokensAndLengths],
    dtype: str,
    bin_path: Path,
    idx_path: Path,
    advance: Callable[[int], None],
) -> tuple[str, str]:
    """Write the pair of all documents of `parts`, in order; returns the SHA-256 of .bin and .idx.

    advance: called with numbers of bytes of the .bin file that have been written.
    """
    with HashedFile(bin_path) as tokens:
        for part in parts:
            with part.tokens.open("rb") as stream:
                while data := stream.read(_AT_ONCE):
                    tokens.write(data)
                    advance(len(data))
    with HashedFile(idx_path) as index:
        _write_index(parts, dtype, index)
    return tokens.sha256, index.sha256


def _write_index(parts: Sequence[TokensAndLengths], dtype: str, index: HashedFile) -> None:
    """Lengths, int32; where documents begin in bytes, int64; after which item a document is over,
    int64 from 0 on: after each."""
    documents = sum(part.lengths.stat().st_size for part in parts) // np.dtype(np.int32).itemsize
    index.write(_HEADER.pack(_MAGIC, _INDEX_VERSION, _CODES[dtype], documents, documents + 1))
    for part in parts:
        index.write(part.lengths.read_bytes())
    end = np.int64(0)
    for part in parts:
        sizes = (
            np.fromfile(part.lengths, dtype=np.int32).astype(np.int64) * np.dtype(dtype).itemsize
        )
        ends = end + np.cumsum(sizes)
        index.write((ends - sizes).data)
        end += sizes.sum()
    for first in range(0, documents + 1, _AT_ONCE):
        index.write(np.arange(first, min(first + _AT_ONCE, documents + 1), dtype=np.int64).data)
