"""Learning a BPE: the same file every time, whole, and its mistakes told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uoe_parallel.data.tokenizer import build_tokenizer
from uoe_parallel.preprocessing.bpe import END_OF_TEXT, train_bpe
from uoe_parallel.preprocessing.tokenizer_program import main

DOCUMENTS = [f"the cat {number} sat on the naïve mat €\n" * 3 for number in range(40)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def learn(source: Path, out: Path, *options: str) -> int:
    return main([str(source), "--out", str(out), "--vocab-size", "300", *options])


def test_the_file_is_a_tokenizer_that_gives_text_back(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "bpe.json"
    assert learn(source, out) == 0
    tokenizer = build_tokenizer(str(out))
    assert (tokenizer.size, tokenizer.eod) == (300, 0)
    assert len(tokenizer.encode(" the cat")) < 4
    for text in (*DOCUMENTS, "никто 🙂 knows\r\n\t this"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    told = capsys.readouterr().out
    for word in ("40", "300 of 300", "bytes per token", tokenizer.fingerprint):
        assert word in told
    assert [path.name for path in out.parent.iterdir()] == ["bpe.json"]


def test_neither_order_nor_format_nor_threads_show(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert learn(source, tmp_path / "one.json") == 0
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(reversed(DOCUMENTS)):
        (texts / f"{number:03}.txt").write_text(text)
    assert learn(texts, tmp_path / "two.json") == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_little_text_gives_fewer_ids() -> None:
    tokenizer = train_bpe(["abab"], 1000)
    assert tokenizer.get_vocab_size() == 258
    assert tokenizer.token_to_id(END_OF_TEXT) == 0


def test_bad_lines_stop_or_are_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with source.open("a") as stream:
        stream.write('{"text": 3}\n')
    assert learn(source, tmp_path / "bpe.json") == 2
    assert "text.jsonl:41: 'text' is a number" in capsys.readouterr().err
    assert not (tmp_path / "bpe.json").exists()
    assert learn(source, tmp_path / "bpe.json", "--bad-lines", "skip") == 0
    told = capsys.readouterr().out
    assert "1 left out" in told and "text.jsonl:41" in told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vocab-size", "256"], "--vocab-size 256 does not hold"),
        (["--min-frequency", "0"], "--min-frequency 0 is below 1"),
        (["--out", "bpe.model"], "use .json"),
        (["--out", "text.json"], "is there already"),
    ],
)
def test_mistakes_are_told_before_text_is_read(
    options: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.json").touch()
    assert learn(Path("nowhere"), Path("bpe.json"), *options) == 2
    assert says in capsys.readouterr().err


def test_no_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text("\n")
    assert learn(tmp_path / "text.jsonl", tmp_path / "bpe.json") == 2
    assert "no document to learn from" in capsys.readouterr().err
