"""Texts of the user's become corpora."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from uoe_parallel.comparison.text import make_corpora
from uoe_parallel.data.token_pair import TokenPair
from uoe_parallel.errors import UserError


def _documents(prefix: str) -> list[bytes]:
    pair = TokenPair(prefix, least="a document")
    bounds = pair.bounds(range(pair.num_documents)).tolist()
    ids = [pair.read(a, b - a).tolist() for a, b in pairwise(bounds)]
    assert all(document[-1] == 256 for document in ids)
    return [bytes(document[:-1]) for document in ids]


def test_every_byte_is_on_one_side(tmp_path: Path) -> None:
    texts = []
    for name in "ab":
        lines = [f"{name} {number} {'x' * (number % 17)}\n" for number in range(400)]
        (tmp_path / name).write_text("".join(lines))
        texts.append(tmp_path / name)
    parts = make_corpora(texts, tmp_path / "made")
    found = {name: _documents(prefix) for name, prefix in parts.items()}
    assert {name: len(documents) for name, documents in found.items()} == {
        "train": 72,
        "validation": 4,
        "test": 4,
    }
    lines = [line for documents in found.values() for d in documents for line in d.splitlines()]
    assert sorted(lines) == sorted(
        line for text in texts for line in text.read_bytes().splitlines()
    )
    # Held-out pieces are from both, and from their first and second half.
    assert [d[:1] for d in found["test"]] == [b"a", b"a", b"b", b"b"]
    assert make_corpora(texts, tmp_path / "made") == parts
    texts[0].write_text("other\n" * 400)
    assert make_corpora(texts, tmp_path / "made") != parts


@pytest.mark.parametrize("content", ["", "one line, however long " * 100])
def test_a_text_that_is_too_short_is_named(content: str, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(content)
    with pytest.raises(UserError, match=r"--text .*short\.txt: .* can't be cut into 40 pieces"):
        make_corpora([text], tmp_path)


def test_a_text_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--text .*none\.txt: no such file"):
        make_corpora([tmp_path / "none.txt"], tmp_path)
