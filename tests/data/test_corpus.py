"""The corpus of Python source: what goes in, on which side, and when it is built again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from uoe_parallel.data import corpus
from uoe_parallel.data.corpus import SPLITS, build_stdlib_corpus, split_of
from uoe_parallel.data.tokenizer import ByteTokenizer
from uoe_parallel.errors import UserError

Change = Callable[[Path, Path, pytest.MonkeyPatch], None]
"""Changes the corpus folder, its source or the program."""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A library of 60 small modules, enough to meet every split, and files to be skipped."""
    folder = tmp_path / "library"
    for number in range(60):
        path = folder / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {number}: gr\u00fc\u00dfe\n" * (number % 5 + 1), "utf-8")
    (folder / "latin1.py").write_bytes("# gr\u00fc\u00dfe".encode("latin-1"))
    (folder / "empty.py").touch()
    (folder / "notes.txt").write_text("SKIPPED")
    (folder / "_sysconfigdata__linux_.py").write_text("SKIPPED")
    for skipped in ("site-packages", "package0/test", "__pycache__", "encodings"):
        path = folder / skipped / "skipped.py"
        path.parent.mkdir(parents=True)
        path.write_text("SKIPPED")
    return folder


def documents(folder: Path, split: str) -> list[bytes]:
    """The documents of a split, checked to end with the end of document and without it."""
    dataset = IndexedDataset(str(folder / split), mmap=True)
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    ids = [np.array(dataset[number]) for number in range(len(dataset))]
    assert all(document[-1] == ByteTokenizer.eod for document in ids)
    return [document[:-1].astype(np.uint8).tobytes() for document in ids]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_usable_file_is_one_document_of_one_split(tmp_path: Path, source: Path) -> None:
    summary = build_stdlib_corpus(tmp_path / "corpus", source)
    paths = sorted(PurePosixPath(p.relative_to(source)) for p in source.rglob("module*.py"))
    for split in SPLITS:
        expected = [(source / p).read_bytes() for p in paths if split_of(p) == split]
        assert expected
        assert documents(tmp_path / "corpus", split) == expected
        measured = summary.splits[split]
        assert measured.files == len(expected)
        assert measured.bytes == sum(map(len, expected))
        assert measured.tokens == measured.bytes + measured.files
    assert sum(split.files for split in summary.splits.values()) == len(paths) == 60


def test_splits_are_about_90_5_5() -> None:
    sides = [split_of(PurePosixPath(f"folder/{number}.py")) for number in range(4000)]
    assert 0.88 < sides.count("train") / 4000 < 0.92
    assert 0.04 < sides.count("validation") / 4000 < 0.06


def test_two_builds_are_equal_to_the_byte(tmp_path: Path, source: Path) -> None:
    build_stdlib_corpus(tmp_path / "one", source)
    build_stdlib_corpus(tmp_path / "nested" / "two", source)
    assert contents(tmp_path / "one") == contents(tmp_path / "nested" / "two")


def test_second_run_reuses_and_says_so(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "corpus"
    first = build_stdlib_corpus(folder, source)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    second = build_stdlib_corpus(folder, source)
    assert (first.reused, second.reused) == (False, True)
    assert "built" in first.describe()
    assert "found and reused" in second.describe()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert second.splits == first.splits


def change_source(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source / "package0" / "module0.py"
    path.write_bytes(path.read_bytes().replace(b"module", b"MODULE"))


def change_python(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")


def change_rule(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SPLIT_RULE", "another rule")


def truncate_data(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(folder / "train.bin", 10)


def lose_index(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "test.idx").unlink()


def garble_summary(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "corpus.json").write_text("{")


@pytest.mark.parametrize(
    "change",
    [change_source, change_python, change_rule, truncate_data, lose_index, garble_summary],
)
def test_any_change_builds_anew(
    change: Change, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "corpus"
    build_stdlib_corpus(folder, source)
    change(folder, source, monkeypatch)
    rebuilt = build_stdlib_corpus(folder, source)
    assert not rebuilt.reused
    assert json.loads((folder / "corpus.json").read_text())["fingerprint"] == rebuilt.fingerprint
    assert build_stdlib_corpus(folder, source).reused
    build_stdlib_corpus(tmp_path / "fresh", source)
    assert contents(folder) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("had_one", [False, True])
def test_interrupted_build_leaves_nothing_half_made(
    had_one: bool, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "parent" / "corpus"
    if had_one:
        build_stdlib_corpus(folder, source)
        (source / "package0" / "module0.py").write_text("# another text\n")
    before = contents(folder) if had_one else {}
    write_split = corpus._write_split

    def interrupt(prefix: Path, texts: list[bytes]) -> None:
        write_split(prefix, texts)
        if prefix.name == "validation":
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_write_split", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_stdlib_corpus(folder, source)
    assert [path.name for path in folder.parent.iterdir()] == (["corpus"] if had_one else [])
    assert (contents(folder) if had_one else {}) == before


def test_source_without_enough_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    with pytest.raises(UserError, match=r"library: 0 usable .* train, validation, test; use a"):
        build_stdlib_corpus(tmp_path / "corpus", tmp_path / "library")
    assert not (tmp_path / "corpus").exists()


def test_folder_of_other_things_is_left_alone(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="holds 'library', which is no part of a corpus"):
        build_stdlib_corpus(tmp_path, source)
    assert (source / "notes.txt").exists()
    with pytest.raises(UserError, match="is a file; name a folder"):
        build_stdlib_corpus(source / "notes.txt", source)


def test_command_line_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    tool = ROOT / "tools" / "make_quickstart_corpus.py"
    done = subprocess.run(
        [sys.executable, tool, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "thesis.tex" in done.stderr
