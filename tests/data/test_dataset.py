"""Windows over .bin/.idx pairs against plain numpy, and every way a pair can be damaged."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from uoe_parallel.data import token_pair
from uoe_parallel.data.dataset import TokenWindows
from uoe_parallel.data.token_pair import Share, TokenPair
from uoe_parallel.errors import UserError

LENGTHS = 34
POINTERS, DOCUMENTS = LENGTHS + 2 * 4, LENGTHS + 2 * 12
"""Where the arrays begin in the index of a pair of two sequences."""


def write_pair(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    sequence_length=st.integers(1, 12),
    dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_windows_equal_a_plain_reference(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    sequence_length: int,
    dtype: type,
) -> None:
    stream = np.arange(sum(lengths)) * 7 % 257
    parts = [part.tolist() for part in np.split(stream, np.cumsum(lengths)[:-1])]
    prefix = write_pair(tmp_path_factory.mktemp("pair") / "tokens.v1", parts, dtype)
    count = (len(stream) - 1) // sequence_length
    if count < 1:
        with pytest.raises(UserError):
            TokenWindows(prefix, sequence_length)
        return
    windows = TokenWindows(prefix, sequence_length)
    assert windows.num_tokens == len(stream)
    assert len(windows) == count
    for number in range(count):
        start = number * sequence_length
        assert windows[number].dtype == np.int64
        np.testing.assert_array_equal(windows[number], stream[start : start + sequence_length + 1])
    for outside in (-1, count):
        with pytest.raises(IndexError):
            windows[outside]


def test_a_window_outlives_its_dataset(tmp_path: Path) -> None:
    windows = TokenWindows(write_pair(tmp_path / "tokens", [[1, 2, 3, 4, 5]]), 4)
    window = windows[0]
    del windows
    assert window.tolist() == [1, 2, 3, 4, 5]


def patch_index(offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        with prefix.with_suffix(".idx").open("r+b") as stream:
            stream.seek(offset)
            stream.write(data)

    return damage


def cut(suffix: str, size: int) -> Callable[[Path], None]:
    return lambda prefix: os.truncate(prefix.with_suffix(suffix), size)


def remove(suffix: str) -> Callable[[Path], None]:
    return lambda prefix: prefix.with_suffix(suffix).unlink()


@pytest.mark.parametrize(
    ("damage", "file", "says"),
    [
        (remove(".idx"), "tokens.idx", "no such file"),
        (remove(".bin"), "tokens.bin", "no such file"),
        (patch_index(0, b"PK"), "tokens.idx", "not a megatron index"),
        (patch_index(9, b"\x02"), "tokens.idx", "index version 2"),
        (patch_index(17, b"\x07"), "tokens.idx", "dtype code 7"),
        (patch_index(17, b"\xff"), "tokens.idx", "dtype code 255"),
        (patch_index(18, struct.pack("<Q", 2**40)), "tokens.idx", "its header promises"),
        (patch_index(LENGTHS, b"\x09"), "tokens.idx", "sequence 1 (from 0) begin at byte 10"),
        (patch_index(LENGTHS + 4, b"\xfb\xff\xff\xff"), "tokens.idx", "sequence 1 (from 0) a len"),
        (patch_index(LENGTHS + 4, b"\x09"), "tokens.bin", "tokens.idx promises 28"),
        (patch_index(POINTERS, b"\x02"), "tokens.idx", "sequence 0 (from 0) begin at byte 2"),
        (patch_index(POINTERS + 15, b"\xff"), "tokens.idx", "sequence 1 (from 0) begin at byte -"),
        (patch_index(DOCUMENTS, b"\x01"), "tokens.idx", "no document that begins with the first"),
        (patch_index(DOCUMENTS + 8, b"\x03"), "tokens.idx", "begin with sequence 3 of 2, and"),
        (patch_index(DOCUMENTS + 15, b"\xff"), "tokens.idx", "document 1 (from 0) begin with"),
        (patch_index(DOCUMENTS + 16, b"\x00"), "tokens.idx", "and the one before it with 1"),
        (patch_index(DOCUMENTS + 16, b"\x01"), "tokens.idx", "end after sequence 1 of 2"),
        (cut(".idx", 0), "tokens.idx", "too few for the header"),
        (cut(".idx", 50), "tokens.idx", "has 50 bytes where its header promises 82"),
        (cut(".bin", 18), "tokens.bin", "has 18 bytes where tokens.idx promises 20"),
        (cut(".bin", 0), "tokens.bin", "has 0 bytes where tokens.idx promises 20"),
    ],
)
def test_damage_is_named_with_file_and_mend(
    damage: Callable[[Path], None],
    file: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix = write_pair(tmp_path / "tokens", [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert len(TokenWindows(prefix, 4)) == 2
    damage(prefix)
    with pytest.raises(UserError) as caught:
        TokenWindows(prefix, 4)
    message = str(caught.value)
    monkeypatch.setattr(token_pair, "_CHECKED_AT_ONCE", 1)
    with pytest.raises(UserError, match=re.escape(message)):
        TokenWindows(prefix, 4)
    assert message.startswith(f"{tmp_path / file}: ")
    assert says in message
    assert "build the corpus" in message


def test_prefix_with_an_ending_is_explained(tmp_path: Path) -> None:
    write_pair(tmp_path / "tokens", [[1, 2, 3]])
    with pytest.raises(UserError, match="without these endings"):
        TokenWindows(tmp_path / "tokens.bin", 2)


@pytest.mark.parametrize("documents", [[], [[]]])
def test_empty_corpus(documents: list[list[int]], tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "tokens", documents)
    with pytest.raises(UserError, match=r"tokens\.bin: the corpus is empty.*at least 5 tokens"):
        TokenWindows(prefix, 4)


def test_corpus_shorter_than_a_window(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "tokens", [[1, 2, 3, 4]])
    assert len(TokenWindows(prefix, 3)) == 1
    with pytest.raises(UserError, match=r"tokens\.bin: 4 tokens .*sequence_length \+ 1 = 5"):
        TokenWindows(prefix, 4)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    parts=st.lists(st.floats(0, 1), max_size=4),
)
def test_shares_lose_no_document_and_have_none_twice(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], parts: list[float]
) -> None:
    stream = np.arange(sum(lengths) + 1)
    documents = [d.tolist() for d in np.split(stream, np.cumsum(lengths))]
    pair = TokenPair(write_pair(tmp_path_factory.mktemp("pair") / "tokens", documents), "text")
    edges = [0.0, *sorted(parts), 1.0]
    shares = [pair.documents_of(Share(*share)) for share in pairwise(edges)]
    assert [d for share in shares for d in share] == list(range(len(documents)))
    for share, end in zip(shares, edges[1:], strict=True):
        bounds = pair.bounds(share)
        assert bounds.tolist() == np.cumsum([0, *lengths, 1])[share.start : share.stop + 1].tolist()
        assert (bounds[:-1] < end * len(stream)).all() or end == 1
        for document, (first, last) in zip(share, pairwise(bounds.tolist()), strict=True):
            assert pair.read(first, last - first).tolist() == documents[document]


def test_windows_of_shares_are_of_their_documents(tmp_path: Path) -> None:
    documents = [[d] * 5 for d in range(10)]
    prefix = write_pair(tmp_path / "tokens", documents)
    train, rest = (TokenWindows(prefix, 4, Share(*share)) for share in ((0, 0.75), (0.75, 1)))
    assert (train.num_tokens, rest.num_tokens) == (40, 10)
    assert rest[0].tolist() == [8] * 5 and rest[1].tolist() == [8] + [9] * 4
    assert len(train) == 9 and train[8].max() == 7
    assert train.fingerprint != rest.fingerprint
    with pytest.raises(UserError, match=r"bin: 0 tokens in the whole documents of one part of da"):
        TokenWindows(prefix, 4, Share(0.91, 0.95))
