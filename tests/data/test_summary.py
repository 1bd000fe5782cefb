"""A corpus that says which tokenizer made it is held to that."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from uoe_parallel.data.summary import check_made_with
from uoe_parallel.data.tokenizer import ByteTokenizer
from uoe_parallel.errors import UserError


def check(tmp_path: Path, summary: str | None) -> None:
    if summary is not None:
        (tmp_path / "corpus.json").write_text(summary)
    check_made_with(str(tmp_path / "corpus"), "bytes", ByteTokenizer())


@pytest.mark.parametrize("fingerprint", [None, "bytes"])
def test_the_right_one_or_none_is_taken(fingerprint: str | None, tmp_path: Path) -> None:
    made_with = {"tokenizer": {"name": "elsewhere", "fingerprint": fingerprint}}
    check(tmp_path, None if fingerprint is None else json.dumps(made_with))


def test_another_one_is_refused_with_both_names(tmp_path: Path) -> None:
    made_with = {"tokenizer": {"name": "bpe.json", "fingerprint": "tokenizers-0"}}
    with pytest.raises(UserError, match=r"corpus\.json: .*bpe\.json .*s-0.* = bytes .*; name"):
        check(tmp_path, json.dumps(made_with))


@pytest.mark.parametrize("summary", ["", "{", "[]", "{}", '{"tokenizer": "bytes"}', "1"])
def test_what_is_no_summary_is_named(summary: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.json: is not the summary .*; preprocess"):
        check(tmp_path, summary)


def test_a_large_file_of_that_name_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(UserError, match="more than 67108864 bytes"):
        check_made_with(str(tmp_path / "corpus"), "bytes", ByteTokenizer())
