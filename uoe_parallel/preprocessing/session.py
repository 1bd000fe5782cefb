"""A corpus made from its sources: parts, joined into a pair, and a summary of it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from uoe_parallel.data.tokenizer import build_tokenizer
from uoe_parallel.errors import UserError
from uoe_parallel.preprocessing.pair import TokensAndLengths, dtype_for, join
from uoe_parallel.preprocessing.parts import Counts, Part, Recipe, remove_parts
from uoe_parallel.preprocessing.sources import LineNumbers
from uoe_parallel.preprocessing.spans import Piece, Reading, Source, cut, find_sources
from uoe_parallel.preprocessing.workers import make_parts

BAD_LINES = ".bad_lines.txt"
"""Ending of the list of lines that gave no document."""
_ENDINGS = (".bin", ".idx", BAD_LINES, ".json")
"""Of the results, the last one last: where it is, all of them are."""
_PARTS, _LOCK, _NEW = ".parts", "lock", "new"


@dataclass(frozen=True)
class Request:
    """What to make."""

    arguments: Sequence[str]
    """Files, folders and patterns, in the order in which their documents are to come."""
    prefix: Path
    """Path of the .bin, .idx and .json to write, without these endings."""
    tokenizer: str = "bytes"
    reading: Reading = field(default_factory=Reading)
    bad_lines: Literal["stop", "skip"] = "stop"
    workers: int = 1
    part_bytes: int = 32 * 2**20
    """About how much of the sources a worker takes at a time."""


@dataclass(frozen=True)
class SourceCounts:
    """What came of one argument."""

    source: str
    files: int
    counts: Counts


@dataclass(frozen=True)
class Corpus:
    """What was made."""

    prefix: Path
    sources: list[SourceCounts]
    counts: Counts
    parts: int
    parts_reused: int
    """Of an earlier run that did not come to its end."""
    record: dict[str, Any]
    """What the .json file has."""


class Display(Protocol):
    """Shows how far the work is."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """The stage `name`, of `total` bytes. To be told, by a call of the value, how many more of
        them are done."""
        ...


def preprocess(request: Request, display: Display) -> Corpus:
    """Make the corpus of `request`; its bytes depend on the sources and how they are read alone.

    Files of its names are replaced when all of the new ones are complete. What a run has finished
    that was ended early is used when it is repeated.

    Raises UserError when sources cannot be found or read, hold no document, have a bad line that
    is not to be skipped, when the corpus cannot be written, or when another run is making it.
    """
    _check_prefix(request.prefix)
    tokenizer = build_tokenizer(request.tokenizer)
    dtype = dtype_for(tokenizer.size)
    recipe = Recipe(request.reading, request.tokenizer, tokenizer.fingerprint, dtype)
    try:
        sources = find_sources(request.arguments, request.reading)
        _refuse_own_files(sources, request.prefix)
        with _own_folder(Path(f"{request.prefix}{_PARTS}")) as folder:
            parts, counts = _make_all(request, recipe, sources, folder, display)
            corpus = _join(request, recipe, sources, parts, counts, folder, display)
            _publish(request.prefix, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or request.prefix}: {error.strerror or error}; mend that and repeat "
            "the command, which goes on from what is finished"
        ) from error
    return corpus


def _check_prefix(prefix: Path) -> None:
    if prefix.suffix in (".bin", ".idx") or prefix.is_dir():
        raise UserError(
            f"--output {prefix}: name the path of the .bin and .idx files without these endings, "
            f"such as {prefix / 'train' if prefix.is_dir() else prefix.with_suffix('')}"
        )


def _refuse_own_files(sources: list[Source], prefix: Path) -> None:
    """What a corpus is made of must not change by the making of it."""
    output = prefix.resolve()
    own = {output.with_name(f"{output.name}{ending}") for ending in (*_ENDINGS, _PARTS)}
    for source in sources:
        folder = Path(source.argument).resolve()
        paths = [file.path.resolve() for file in source.files]
        if folder in output.parents or any(own & {path, *path.parents} for path in paths):
            raise UserError(
                f"--output {prefix}: what is written there would belong to {source.argument} when "
                "the command is repeated; name a place outside the sources"
            )


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """The folder of parts, this process's alone while it is open; it goes when that went well."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_path = folder / _LOCK
    with lock_path.open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another process is making this corpus; wait for it or name another "
                "--output"
            ) from error
        except OSError:
            pass  # A file system without locks.
        yield folder
        remove_parts(folder)
        lock_path.unlink()
    # Somebody may keep files of their own here.
    with suppress(OSError):
        folder.rmdir()


def _make_all(
    request: Request, recipe: Recipe, sources: list[Source], folder: Path, display: Display
) -> tuple[list[Part], list[Counts]]:
    """All parts in order, and what is in those of each source. Lists bad lines."""
    pieces = [
        (number, piece)
        for number, source in enumerate(sources)
        for piece in cut(source, request.reading, request.part_bytes)
    ]
    parts, counts, numbers = list[Part](), [Counts()] * len(sources), LineNumbers()
    made = make_parts(recipe, folder, [piece for _, piece in pieces], request.workers)
    sizes = [sum(span.size for span in piece) for _, piece in pieces]
    with (
        closing(made),
        (folder / f"{_NEW}{BAD_LINES}").open("w", encoding="utf-8", errors="replace") as listed,
        display.stage("encode", sum(sizes)) as advance,
    ):
        for (number, piece), size, part in zip(pieces, sizes, made, strict=True):
            for place in _bad_lines(piece, part, numbers):
                if request.bad_lines == "stop":
                    raise UserError(
                        f"{place}; mend it, or leave such lines out with --bad-lines skip"
                    )
                listed.write(f"{place}\n")
            parts.append(part)
            counts[number] += part.counts
            advance(size)
    return parts, counts


def _bad_lines(piece: Piece, part: Part, numbers: LineNumbers) -> Iterator[str]:
    for span, line, fault in part.faults():
        yield numbers.place(piece[span], line, fault)
    for span, lines in zip(piece, part.lines, strict=True):
        numbers.leave(span, lines)


def _join(
    request: Request,
    recipe: Recipe,
    sources: list[Source],
    parts: list[Part],
    counts: list[Counts],
    folder: Path,
    display: Display,
) -> Corpus:
    """Write the results, under their new names. Raises UserError if there is no document."""
    of_all = sum(counts, Counts())
    if of_all.documents == 0:
        raise UserError(
            f"{', '.join(request.arguments)}: no document, and {of_all.bad_lines} bad lines; name "
            "other files, or the field that has the text by --field"
        )
    with display.stage("join", of_all.tokens * np.dtype(recipe.dtype).itemsize) as advance:
        bin_sha256, idx_sha256 = join(
            [TokensAndLengths(part.tokens_path, part.lengths_path) for part in parts],
            recipe.dtype,
            folder / f"{_NEW}.bin",
            folder / f"{_NEW}.idx",
            advance,
        )
    of_sources = [
        SourceCounts(source.argument, len(source.files), of_one)
        for source, of_one in zip(sources, counts, strict=True)
    ]
    record = {
        **asdict(of_all),
        "tokens_per_byte": of_all.tokens / of_all.text_bytes,
        "tokenizer": {"name": recipe.tokenizer, "fingerprint": recipe.fingerprint},
        "dtype": recipe.dtype,
        "reading": asdict(recipe.reading),
        "sources": [
            {"source": source.source, "files": source.files, **asdict(source.counts)}
            for source in of_sources
        ],
        "sha256": {"bin": bin_sha256, "idx": idx_sha256},
    }
    text = json.dumps(record, indent=2) + "\n"
    (folder / f"{_NEW}.json").write_text(text, "utf-8")
    reused = sum(part.was_there for part in parts)
    return Corpus(request.prefix, of_sources, of_all, len(parts), reused, record)


def _publish(prefix: Path, folder: Path) -> None:
    """Give the results their names. Were this to stop in the midst of it, there is no summary, and
    the parts are still there to repeat it from."""
    final = [Path(f"{prefix}{ending}") for ending in _ENDINGS]
    new = [folder / f"{_NEW}{ending}" for ending in _ENDINGS]
    for path in new:
        _sync(path)
    final[-1].unlink(missing_ok=True)
    for source, target in zip(new, final, strict=True):
        source.replace(target)
    bad_lines = Path(f"{prefix}{BAD_LINES}")
    if bad_lines.stat().st_size == 0:
        bad_lines.unlink()
    _sync(prefix.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
