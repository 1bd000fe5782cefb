"""Documents are found in every kind of file, wherever it is cut, and what is none is told of."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from uoe_parallel.errors import UserError
from uoe_parallel.preprocessing.sources import LineNumbers, SpanReader, read_texts
from uoe_parallel.preprocessing.spans import Reading, cut, find_sources

DOCUMENTS = [
    "one",
    "two\nlines\n",
    " ",
    "gr\u00fc\u00dfe \u2028 \U0001f600",
    "x" * 100,
    "\ufeffmark",
    "end",
]
SEPARATED = Reading(separator="-- next --")


def write_jsonl(path: Path, texts: list[Any] = DOCUMENTS) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write("\n".join(json.dumps({"id": 1, "text": t}) for t in texts).encode())
    return path


def write_zstd(path: Path) -> Path:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(write_jsonl(path.with_suffix("")).read_bytes())
    path.with_suffix("").unlink()
    return path


def write_parquet(path: Path, texts: list[Any] = DOCUMENTS, kind: Any = None) -> Path:
    column = pa.array(texts, kind or pa.string())
    pyarrow.parquet.write_table(pa.table({"text": column}), path, row_group_size=2)
    return path


def write_dataset(path: Path, texts: list[Any] = DOCUMENTS) -> Path:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": [*texts, "left out"], "n": [*texts, ""]})
    rows.select(range(len(texts))).save_to_disk(str(path))
    return path


def write_files(path: Path) -> Path:
    path.mkdir()
    for number, text in enumerate(DOCUMENTS):
        (path / f"{number}.txt").write_bytes(text.encode())
    return path


def write_separated(path: Path) -> Path:
    path.write_bytes(b"one\n-- next --\n\n-- next --\r\n-- next --\ntwo\n\n-- next --")
    return path


WRITERS: list[tuple[str, Callable[[Path], Path]]] = [
    ("a.jsonl", write_jsonl),
    ("a.json.gz", write_jsonl),
    ("a.ndjson.zst", write_zstd),
    ("a.parquet", write_parquet),
    ("dictionary.parquet", lambda p: write_parquet(p, kind=pa.dictionary(pa.int8(), pa.string()))),
    ("folder", write_dataset),
    ("texts", write_files),
]


def read(arguments: list[Path], reading: Reading | None = None) -> tuple[list[str], list[str]]:
    """Documents and bad lines."""
    bad: list[str] = []
    return list(read_texts(map(str, arguments), reading or Reading(), bad.append)), bad


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_every_kind_of_file_has_the_same_documents(
    tmp_path: Path, name: str, write: Callable[[Path], Path]
) -> None:
    expected = DOCUMENTS
    if name == "texts":
        # There it is the mark of the encoding.
        expected = [text.removeprefix("\ufeff") for text in DOCUMENTS]
    assert read([write(tmp_path / name)]) == (expected, [])


def test_separators_stand_between_documents_that_have_text(tmp_path: Path) -> None:
    assert read([write_separated(tmp_path / "a.txt")], SEPARATED) == (["one\n", "two\n\n"], [])


def test_a_paragraph_is_a_document_between_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\none\n\n\ntwo")
    assert read([tmp_path], Reading(separator="")) == (["one\none\n", "two"], [])


BAD_JSON = [
    b'\xef\xbb\xbf{"text": "marked"}\r',
    b'{"text": "a"',
    b" ",
    b'{"body": "a"}',
    b'{"text": null}',
    b'{"text": 1}',
    b'["text"]',
    b'{"text": ""}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud83d"}',
    b"[" * 5000,
    b'{"text": "good"}',
    b"",
]
FAULTS = [
    "2: no JSON: Expecting ',' delimiter at column 13",
    "4: no field 'text'",
    "5: 'text' is null, not text",
    "6: 'text' is a number, not text",
    "7: a list, not a JSON object",
    "8: empty text",
    "9: no UTF-8: byte 11 is 0xff",
    "10: no text: half a character, \\ud83d, at 1",
    "11: no JSON that can be read: ",
]


@pytest.mark.parametrize("most_bytes", [1, 7, 64, 10**6])
def test_bad_lines_have_their_numbers_and_reasons_wherever_the_file_is_cut(
    tmp_path: Path, most_bytes: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(BAD_JSON))
    good, bad = read_cut(path, Reading(), most_bytes)
    assert good == ["marked", "good"]
    for told, fault in zip(bad, FAULTS, strict=True):
        assert told.startswith(f"{path}:{fault}")


def test_rows_without_text_are_bad_lines(tmp_path: Path) -> None:
    rows = pa.array([b"a", None, b"", b"\xff", b"b"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 5, rows.buffers())})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    reasons = ["2: 'text' is null, not text", "3: empty text", "4: no UTF-8: byte 1 is 0xff"]
    for most_bytes in (1, 10**6):
        assert read_cut(path, Reading(), most_bytes) == (
            ["a", "b"],
            [f"{path}:{reason}" for reason in reasons],
        )


def read_cut(path: Path, reading: Reading, most_bytes: int) -> tuple[list[str], list[str]]:
    """Documents and bad lines of a file that is cut into pieces."""
    good, bad, numbers = list[str](), list[str](), LineNumbers()
    (source,) = find_sources([str(path)], reading)
    for piece in cut(source, reading, most_bytes):
        for span in piece:
            reader = SpanReader(span, reading)
            for line, text, fault in reader:
                if text is None:
                    bad.append(numbers.place(span, line, fault))
                else:
                    good.append(text)
            numbers.leave(span, reader.lines)
    return good, bad


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_dataset, write_separated])
def test_no_document_is_lost_or_read_twice_wherever_a_file_is_cut(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    ending = {write_jsonl: ".jsonl", write_parquet: ".parquet", write_separated: ".txt"}
    path = write(tmp_path / f"a{ending.get(write, '')}")
    reading = SEPARATED if write is write_separated else Reading()
    whole = read_cut(path, reading, 10**6)
    assert whole[0]
    (source,) = find_sources([str(path)], reading)
    assert len(list(cut(source, reading, 1))) > 3
    for most_bytes in (*range(1, 60, 20 if write is write_dataset else 1), 10**5):
        assert read_cut(path, reading, most_bytes) == whole


def test_small_files_share_a_piece_and_others_do_not_mix_with_them(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("12345")
    (tmp_path / "5.txt").write_text("x" * 100)
    (source,) = find_sources([str(tmp_path)], Reading())
    sizes = [[span.size for span in piece] for piece in cut(source, Reading(), 20)]
    assert sizes == [[5] * 4, [5], [100], [5] * 4]


def test_folders_and_patterns_come_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.jsonl", ".hidden/x.txt", "a/.x.txt", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert read([tmp_path])[0] == ["a/b.jsonl", "a/z.txt", "b.txt"]
    assert read([tmp_path / "**" / "*.txt"])[0] == ["a/z.txt", "b.txt"]
    assert read([tmp_path / "b.txt", tmp_path / "a"])[0] == ["b.txt", "a/b.jsonl", "a/z.txt"]
    assert read([tmp_path], Reading(format="text"))[0][-1] == "notes.md"
    (tmp_path / "[a].txt").write_text("itself")
    assert read([tmp_path / "[a].txt"])[0] == ["itself"]


def damage_gzip(folder: Path) -> Path:
    path = write_jsonl(folder / "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-10])
    return path


def damage_parquet(folder: Path) -> Path:
    path = write_parquet(folder / "a.parquet")
    path.write_bytes(path.read_bytes()[:-1])
    return path


def damage_dataset(folder: Path) -> Path:
    path = write_dataset(folder / "a")
    next(path.glob("*.arrow")).unlink()
    return path


def several_datasets(folder: Path) -> Path:
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder / "both"))
    return folder / "both"


def unknown_ending(folder: Path) -> Path:
    (folder / "a.pdf").touch()
    return folder / "a.pdf"


MISTAKES: list[tuple[Callable[[Path], Path], str]] = [
    (lambda folder: folder / "nothing.jsonl", "names no file with documents"),
    (lambda folder: folder, "names no file with documents"),
    (unknown_ending, "does not say what it holds; say it with --format"),
    (damage_gzip, "cannot be read (Compressed file ended"),
    (damage_parquet, "cannot be read (Parquet magic bytes"),
    (damage_dataset, "cannot be read ("),
    (several_datasets, r"several datasets (train, test); name the folder of one, such as"),
    (lambda f: write_parquet(f / "a.parquet", [1], pa.int64()), "'text' has int64, not text"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES)
def test_sources_that_cannot_be_used_are_named(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError) as raised:
        read([path])
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)


def test_a_missing_column_is_told_with_those_there_are(tmp_path: Path) -> None:
    for path in (write_parquet(tmp_path / "a.parquet"), write_dataset(tmp_path / "a")):
        with pytest.raises(UserError, match=r"no column 'body', but text.*--field"):
            read([path], Reading(field="body"))


def test_a_file_is_named_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl: is named by .* and by .*name it once"):
        read([tmp_path, path])
