"""A corpus is the same whoever makes it, in however many parts and attempts."""

from __future__ import annotations

import fcntl
import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from numpy.typing import NDArray

from uoe_parallel.data.dataset import TokenWindows
from uoe_parallel.data.tokenizer import ByteTokenizer
from uoe_parallel.errors import UserError
from uoe_parallel.preprocessing import parts, session
from uoe_parallel.preprocessing.pair import dtype_for
from uoe_parallel.preprocessing.session import Corpus, Request, preprocess

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = (".bin", ".idx", ".json", ".bad_lines.txt")


class Silence:
    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size

        yield advance
        assert done == total


def make(request: Request) -> Corpus:
    return preprocess(request, Silence())


def lines(count: int) -> list[str]:
    """JSON lines of documents that differ in length."""
    draw = random.Random(0)
    return [
        json.dumps({"text": f"{n} " + "gr\u00fc\u00df " * draw.randrange(9)}) for n in range(count)
    ]


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """Two sources, one of them of several files, and three bad lines in the first."""
    good = lines(60)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join([*good[:30], "", "{", *good[30:]]))
    (tmp_path / "texts" / "b.jsonl").write_text("null\n" + "\n".join(lines(5)) + "\n{}\n")
    (tmp_path / "more.txt").write_text("more text")
    sources = [str(tmp_path / "texts"), str(tmp_path / "more.txt")]
    return Request(sources, tmp_path / "out" / "corpus", bad_lines="skip", part_bytes=700)


def results(request: Request) -> dict[str, bytes]:
    """Contents of the files there are, and that there are no others of this name."""
    found = {ending: Path(f"{request.prefix}{ending}") for ending in ENDINGS}
    others = set(request.prefix.parent.glob(f"{request.prefix.name}*")) - set(found.values())
    assert not others
    return {ending: path.read_bytes() for ending, path in found.items() if path.exists()}


def test_the_pair_is_that_of_megatrons_builder(
    tmp_path: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [json.loads(line)["text"] for line in (*lines(60), *lines(5))] + ["more text"]
    for size, dtype in ((257, np.uint16), (65500, np.int32)):
        monkeypatch.setattr(ByteTokenizer, "size", size)
        make(request_)
        builder = IndexedDatasetBuilder(str(tmp_path / "built.bin"), dtype)
        for text in texts:
            ids = np.append(ByteTokenizer().encode(text), ByteTokenizer.eod)
            builder.add_item(torch.from_numpy(ids))
            builder.end_document()
        builder.finalize(str(tmp_path / "built.idx"))
        made = results(request_)
        for ending in (".bin", ".idx"):
            assert made[ending] == (tmp_path / f"built{ending}").read_bytes()
    assert TokenWindows(request_.prefix, 16).num_tokens == sum(len(t.encode()) + 1 for t in texts)


def test_the_type_of_tokens_is_the_one_that_megatron_chooses() -> None:
    for size in (257, 65499, 65500, 65536, 100_000):
        assert dtype_for(size) == np.dtype(DType.optimal_dtype(size)).name


def test_the_summary_tells_what_is_in_the_corpus(tmp_path: Path, request_: Request) -> None:
    corpus = make(request_)
    made = results(request_)
    record = json.loads(made[".json"])
    texts = [json.loads(line)["text"] for line in (*lines(60), *lines(5))]
    size = sum(len(text.encode()) for text in texts)
    assert record["sources"] == [
        {
            "source": str(tmp_path / "texts"),
            "files": 2,
            "documents": 65,
            "tokens": size + 65,
            "text_bytes": size,
            "bad_lines": 3,
        },
        {
            "source": str(tmp_path / "more.txt"),
            "files": 1,
            "documents": 1,
            "tokens": 10,
            "text_bytes": 9,
            "bad_lines": 0,
        },
    ]
    assert (record["documents"], record["tokens"], record["bad_lines"]) == (66, size + 75, 3)
    assert record["tokens_per_byte"] == (size + 75) / (size + 9)
    assert record["tokenizer"] == {"name": "bytes", "fingerprint": "bytes"}
    for ending in ("bin", "idx"):
        assert record["sha256"][ending] == hashlib.sha256(made[f".{ending}"]).hexdigest()
    assert corpus.record == record
    told = made[".bad_lines.txt"].decode().splitlines()
    folder = tmp_path / "texts"
    assert [line.split(": ")[0] for line in told] == [
        f"{folder}/{place}" for place in ("a.jsonl:32", "b.jsonl:1", "b.jsonl:7")
    ]


def test_neither_workers_nor_parts_show_in_a_byte(tmp_path: Path, request_: Request) -> None:
    make(request_)
    expected = results(request_)
    assert len(expected) == len(ENDINGS)
    for workers, part_bytes in ((2, 500), (1, 60), (1, 10**9)):
        other = tmp_path / str(part_bytes) / "corpus"
        request = replace(request_, prefix=other, workers=workers, part_bytes=part_bytes)
        make(request)
        assert results(request) == expected


def test_the_first_bad_line_stops_by_choice_and_what_is_done_is_kept(request_: Request) -> None:
    make(request_)
    before = results(request_)
    with pytest.raises(UserError, match=r"a\.jsonl:32: no JSON: .*--bad-lines skip"):
        make(replace(request_, bad_lines="stop"))
    left = Path(f"{request_.prefix}.parts")
    whole = len(list(left.glob("*.json")))
    assert whole > 1
    assert {e: Path(f"{request_.prefix}{e}").read_bytes() for e in ENDINGS} == before
    assert make(request_).parts_reused == whole
    assert results(request_) == before


def test_a_damaged_part_and_one_of_a_changed_file_are_made_again(
    tmp_path: Path, request_: Request
) -> None:
    (tmp_path / "zz.jsonl").write_text("{")
    doomed = replace(
        request_, arguments=[request_.arguments[1], str(tmp_path / "zz.jsonl")], bad_lines="stop"
    )
    folder = Path(f"{request_.prefix}.parts")
    request = replace(doomed, bad_lines="skip")

    def leave_parts() -> None:
        with pytest.raises(UserError, match=r"zz\.jsonl:1"):
            make(doomed)

    leave_parts()
    assert make(request).parts_reused == 2
    expected = results(request)

    leave_parts()
    for path in folder.glob("*.tokens"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    corpus = make(request)
    assert corpus.parts_reused < 2
    assert results(request) == expected

    leave_parts()
    (tmp_path / "more.txt").write_text("MORE TEXT")
    assert make(request).parts_reused == 1
    assert results(request)[".bin"][:8] == np.frombuffer(b"MORE", np.uint8).astype("<u2").tobytes()


def test_a_killed_run_leaves_no_worker_and_is_gone_on_with(
    tmp_path: Path, request_: Request
) -> None:
    (tmp_path / "texts" / "c.jsonl").write_text("\n".join(lines(3000)))
    expected = replace(request_, prefix=tmp_path / "undisturbed" / "corpus", part_bytes=10**6)
    make(expected)
    command = ["tools/preprocess_data.py", *request_.arguments, "--output", request_.prefix]
    options = ["--workers=2", "--part-megabytes=0.0007", "--bad-lines=skip"]
    with subprocess.Popen(
        [sys.executable, *command, *options], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    ) as running:
        folder = Path(f"{request_.prefix}.parts")
        while len(list(folder.glob("*.json"))) < 3:
            assert running.poll() is None
            time.sleep(0.01)
        family = psutil.Process(running.pid).children(recursive=True)
        running.kill()
    psutil.wait_procs(family, timeout=20)
    assert len(family) >= 2
    assert not any(process.is_running() for process in family)
    assert not Path(f"{request_.prefix}.json").exists()
    assert make(request_).parts_reused >= 3
    assert results(request_) == results(expected)


def test_a_corpus_has_one_maker_at_a_time(request_: Request) -> None:
    folder = Path(f"{request_.prefix}.parts")
    folder.mkdir(parents=True)
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is making this corpus"):
            make(request_)
    (folder / "notes").touch()
    make(request_)
    assert [path.name for path in folder.iterdir()] == ["notes"]


def test_sources_without_a_document_are_refused(request_: Request) -> None:
    with pytest.raises(UserError, match=r"no document, and 68 bad lines; .*--field"):
        make(
            replace(
                request_, reading=session.Reading(field="body"), arguments=request_.arguments[:1]
            )
        )


def test_a_prefix_that_cannot_be_written_is_told(tmp_path: Path, request_: Request) -> None:
    (tmp_path / "file").touch()
    for name, message in (
        ("file/corpus", "file/corpus.parts: Not a directory; "),
        ("train.bin", r"without these endings, such as .*train$"),
        ("texts", r"without these endings, such as .*texts/train$"),
    ):
        with pytest.raises(UserError, match=message):
            make(replace(request_, prefix=tmp_path / name))


def test_results_among_the_sources_are_refused(tmp_path: Path, request_: Request) -> None:
    message = "what is written there would belong to"
    with pytest.raises(UserError, match=message):
        make(replace(request_, prefix=tmp_path / "texts" / "made" / "corpus"))
    make(request_)
    for pattern in ("out/*.json", "out/*.txt"):
        with pytest.raises(UserError, match=message):
            make(replace(request_, arguments=[str(tmp_path / pattern)]))


class Meddling(ByteTokenizer):
    """Takes a word for an end, and calls another function at some texts."""

    def __init__(self, meddle: Callable[[], None]) -> None:
        self._meddle = meddle

    def encode(self, text: bytes | str) -> NDArray[np.int64]:
        ids = super().encode(text)
        if text == "more text":
            self._meddle()
            ids[4] = self.eod
        return ids


def test_text_that_would_end_its_document_is_a_bad_line(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "build_tokenizer", lambda _: Meddling(lambda: None))
    corpus = make(request_)
    assert (corpus.sources[1].counts.documents, corpus.sources[1].counts.bad_lines) == (0, 1)
    assert (
        b"more.txt:1: text that the tokenizer takes for the end"
        in results(request_)[".bad_lines.txt"]
    )


def test_a_file_that_changes_while_it_is_read_ends_the_run(
    tmp_path: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle() -> None:
        (tmp_path / "more.txt").write_text("more and more")

    monkeypatch.setattr(parts, "build_tokenizer", lambda _: Meddling(meddle))
    with pytest.raises(UserError, match=r"more\.txt: changed while it was read"):
        make(request_)
