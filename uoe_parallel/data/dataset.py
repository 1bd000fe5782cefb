"""Megatron's .bin/.idx pairs, checked before they are read, and windows of tokens over one.

Megatron's own GPTDataset is not used: it fixes the order of samples for a given number of them,
so that a longer run sees another order; it cuts its windows after shuffling the documents, so
that validation windows change with the seed; and its caches load with pickling allowed. Here a
window's number alone says what is in it, and the order is `uoe_parallel.data.batches`' matter.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

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


class TokenWindows:
    """Memory-mapped windows of `sequence_length` + 1 tokens, over document boundaries.

    The documents are one stream of tokens in the order of the .bin file. Window i starts at
    token i * sequence_length and shares its last token with the start of the next one: that
    token is the last label here and the first input there. Tokens after the last whole window
    are never drawn.

    Raises UserError when a file is missing, the index is damaged or disagrees with the size of
    the .bin file, or when there are too few tokens for one window.
    """

    def __init__(self, prefix: str | Path, sequence_length: int) -> None:
        assert sequence_length > 0
        self.prefix = str(prefix)
        self.sequence_length = sequence_length
        self.num_tokens = count_tokens(self.prefix)
        if self.num_tokens == 0:
            raise UserError(
                f"{get_bin_path(self.prefix)}: the corpus is empty; build it from at least "
                f"{sequence_length + 1} tokens of text"
            )
        if len(self) < 1:
            raise UserError(
                f"{get_bin_path(self.prefix)}: {self.num_tokens} tokens are fewer than one "
                f"window of model.sequence_length + 1 = {sequence_length + 1}; use a larger "
                "corpus or a smaller model.sequence_length"
            )
        self._dataset = open_pair(self.prefix)

    @property
    def fingerprint(self) -> list[int]:
        """The number of tokens and the first window's checksum."""
        return [self.num_tokens, zlib.crc32(self[0].tobytes())]

    def __len__(self) -> int:
        return (self.num_tokens - 1) // self.sequence_length

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """Window `number` (from 0): int64 [sequence_length + 1], a copy."""
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        return read_tokens(self._dataset, number * self.sequence_length, self.sequence_length + 1)


def open_pair(prefix: str) -> IndexedDataset:
    """The memory-mapped pair, which `count_tokens` has found whole and not empty."""
    try:
        return IndexedDataset(prefix, mmap=True)
    except (AssertionError, IndexError, ValueError) as error:
        raise _damaged(get_idx_path(prefix), f"cannot be read ({error})") from error


def read_tokens(dataset: IndexedDataset, first: int, count: int) -> NDArray[np.int64]:
    """`count` tokens from token `first` of the .bin file on: int64 [count], a copy."""
    dtype = dataset.index.dtype
    tokens = dataset.bin_reader.read(dtype, count, first * np.dtype(dtype).itemsize)
    # The map is closed with the dataset: a view that outlived it would crash the process.
    return tokens.astype(np.int64, copy=True)


def count_tokens(prefix: str) -> int:
    """Number of tokens in the pair, after checking that its two files are whole and agree.

    Raises UserError if they are not.
    """
    idx_path, bin_path = Path(get_idx_path(prefix)), Path(get_bin_path(prefix))
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; a corpus is named by the path of its .bin and .idx files "
                f"without these endings, here {prefix!r}: build the corpus or correct the path"
            )
    idx_size, bin_size = idx_path.stat().st_size, bin_path.stat().st_size
    with idx_path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise _damaged(idx_path, f"{idx_size} bytes are too few for the header of an index")
    magic, version, code, sequences, boundaries = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise _damaged(idx_path, f"begins with {magic!r}, so it is not a megatron index")
    if version != 1:
        raise _damaged(idx_path, f"is of index version {version}, only version 1 is known")
    itemsize = _integer_size(idx_path, code)
    # Per sequence an int32 length and an int64 pointer, per boundary an int64.
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if idx_size != expected:
        raise _damaged(idx_path, f"has {idx_size} bytes where its header promises {expected}")
    lengths = np.fromfile(idx_path, dtype=np.int32, count=sequences, offset=_HEADER.size)
    tokens = int(lengths.sum(dtype=np.int64))
    if bin_size != tokens * itemsize:
        raise _damaged(
            bin_path,
            f"has {bin_size} bytes where {idx_path.name} promises {tokens * itemsize} "
            f"({tokens} tokens of {itemsize} bytes)",
        )
    return tokens


def _integer_size(idx_path: Path, code: int) -> int:
    """Bytes per token of megatron's dtype code."""
    try:
        dtype = np.dtype(DType.dtype_from_code(code))
    except ValueError:
        dtype = None
    if dtype is None or dtype.kind not in "iu":
        raise _damaged(idx_path, f"names dtype code {code}, which is no integer type")
    return dtype.itemsize


def _damaged(path: str | Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; {_REMAKE}")
