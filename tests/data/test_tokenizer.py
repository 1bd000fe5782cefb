"""Bytes to ids and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uoe_parallel.data.tokenizer import (
    ByteTokenizer,
    build_tokenizer,
    num_model_ids,
    padded_vocab_size,
)
from uoe_parallel.errors import UserError


@given(st.text())
def test_text_comes_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary())
def test_ids_are_the_bytes(data: bytes) -> None:
    ids = ByteTokenizer().encode(data)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(data)


def test_decode_skips_ends_of_documents_and_replaces_what_is_not_utf8() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([104, tokenizer.eod, 105, 0xFF]) == "hi\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="range"):
        tokenizer.decode([tokenizer.size])


def test_every_id_is_below_the_size() -> None:
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.size == 257
    assert tokenizer.eod < tokenizer.size


def test_masks_have_an_id_that_no_text_has() -> None:
    tokenizer = ByteTokenizer()
    assert num_model_ids(tokenizer, "masked_token") == tokenizer.size + 1
    assert num_model_ids(tokenizer, "next_token") == tokenizer.size
    assert num_model_ids(tokenizer, "classification") == tokenizer.size


def test_unknown_tokenizer_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: 'words'.*bytes"):
        build_tokenizer("words")


@given(st.integers(1, 10**6), st.integers(1, 4096))
def test_padded_vocabulary_is_the_next_multiple(size: int, multiple: int) -> None:
    padded = padded_vocab_size(size, multiple)
    assert padded % multiple == 0
    assert size <= padded < size + multiple
