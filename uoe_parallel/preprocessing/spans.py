"""Which files hold the documents, and how they are shared out: spans of files, pieces of spans.

All of it depends on names, sizes and metadata of files alone; no text is read.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from uoe_parallel.errors import UserError

Format = Literal["jsonl", "text", "parquet", "datasets"]
FORMATS: tuple[Format, ...] = get_args(Format)

_FORMAT_OF_ENDING: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")
"""Endings that may follow those of JSONL and text. Such a file is read from its beginning only."""


@dataclass(frozen=True)
class Reading:
    """How documents are found in files."""

    format: Format | None = None
    """None: by the ending of each file."""
    field: str = "text"
    """The field of a JSON object, or the column of a table, that has the text."""
    separator: str | None = None
    """The line between two documents of a text file; None: each file is one document."""


@dataclass(frozen=True)
class SourceFile:
    """A file, or a folder written by `datasets.Dataset.save_to_disk`."""

    path: Path
    format: Format


@dataclass(frozen=True)
class Source:
    """What one argument of the command stands for."""

    argument: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Span:
    """A run of one file, from its `start` up to its `end`.

    They count bytes of JSONL and text, row groups of Parquet and rows of datasets. A line belongs
    to the span in which its first byte is, and a document between separators to the one in which
    the first byte after the separator's line would be, or the file begins.
    """

    file: SourceFile
    start: int
    end: int | None
    """None: the end of the file, wherever that is."""
    size: int
    """About how much there is to read, in bytes."""
    identity: tuple[int, int]
    """Of the file when the span was cut: see `identity_of`."""


Piece = tuple[Span, ...]
"""What is read and encoded at a time. Only its first span may begin within a file."""


def find_sources(arguments: Iterable[str], reading: Reading) -> list[Source]:
    """The files that `arguments` name: files, folders, patterns, folders of `datasets`.

    Folders are searched to the bottom, without names that begin with a dot, for files of known
    endings, or where `reading` gives a format for all files. Files come in the order of their
    paths, sources in that of the arguments.

    Raises UserError for an argument that names no such file, or a file that another one named.
    """
    sources, named = list[Source](), dict[Path, Source]()
    for argument in arguments:
        files = tuple(_files_of(argument, reading))
        if not files:
            raise UserError(
                f"{argument}: names no file with documents; known endings are "
                f"{', '.join(_FORMAT_OF_ENDING)}, also with {' or '.join(COMPRESSED)} after them; "
                "correct the path or say how to read other files with --format"
            )
        source = Source(argument, files)
        for file in files:
            other = named.setdefault(file.path.resolve(), source)
            if other is not source:
                raise UserError(
                    f"{file.path}: is named by {other.argument} and by {argument}; name it once "
                    "(weights of data.train make one corpus count more than another)"
                )
        sources.append(source)
    return sources


def cut(source: Source, reading: Reading, most_bytes: int) -> Iterator[Piece]:
    """The pieces of a source, in order, of about `most_bytes` where that is possible: a
    compressed file, a document or a row group is never cut.

    Raises UserError for a table that is damaged or has no text in `reading.field`.
    """
    piece, size = list[Span](), 0
    for file in source.files:
        for span in _spans(file, reading, most_bytes):
            if piece and size + span.size > most_bytes:
                yield tuple(piece)
                piece, size = [], 0
            piece.append(span)
            size += span.size
    if piece:
        yield tuple(piece)


def identity_of(file: SourceFile) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds: other contents, as good as always,
    have another one."""
    paths = sorted(file.path.rglob("*")) if file.path.is_dir() else [file.path]
    stats = [path.stat() for path in paths]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def _files_of(argument: str, reading: Reading) -> Iterator[SourceFile]:
    path = Path(argument)
    if path.is_dir() and not _is_dataset(path):
        yield from _files_in(path, reading)
        return
    # Path.glob takes no absolute patterns.
    matches = [argument] if path.exists() else sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
    for match in map(Path, matches):
        if match.is_file():
            yield SourceFile(match, _format_of(match, reading))
        elif _is_dataset(match):
            yield SourceFile(match, "datasets")


def _is_dataset(path: Path) -> bool:
    """Raises UserError for a folder of several."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
        raise UserError(
            f"{path}: has several datasets ({', '.join(splits)}); name the folder of one, such as "
            f"{path / splits[0]}"
        )
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _files_in(folder: Path, reading: Reading) -> Iterator[SourceFile]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and (reading.format or _known_format(path)):
            yield SourceFile(path, _format_of(path, reading))


def _format_of(path: Path, reading: Reading) -> Format:
    form = reading.format or _known_format(path)
    if form is None:
        raise UserError(
            f"{path}: its ending does not say what it holds; say it with --format, which is one of "
            f"{', '.join(FORMATS)}"
        )
    if form == "datasets":
        raise UserError(
            f"{path}: is no folder that datasets.Dataset.save_to_disk wrote; name that folder, or "
            "another --format"
        )
    return form


def _known_format(path: Path) -> Format | None:
    suffix = path.suffix
    if suffix in COMPRESSED:
        suffix = path.with_suffix("").suffix
        if suffix == ".parquet":
            return None
    return _FORMAT_OF_ENDING.get(suffix)


def _spans(file: SourceFile, reading: Reading, most_bytes: int) -> Iterator[Span]:
    identity = identity_of(file)
    if file.format in ("jsonl", "text"):
        size = file.path.stat().st_size
        whole_document = file.format == "text" and reading.separator is None
        if whole_document or file.path.suffix in COMPRESSED:
            yield Span(file, 0, None, size, identity)
            return
        for start in range(0, size, most_bytes):
            end = min(start + most_bytes, size)
            yield Span(file, start, end, end - start, identity)
        return
    runs = _row_groups if file.format == "parquet" else _rows
    for start, end, size in runs(file.path, reading.field, most_bytes):
        yield Span(file, start, end, size, identity)


def _row_groups(path: Path, field: str, most_bytes: int) -> Iterator[tuple[int, int, int]]:
    """First, last and size of runs of row groups."""
    from uoe_parallel.preprocessing.tables import open_parquet

    with open_parquet(path, field) as table:
        metadata: Any = table.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(field)
        sizes = [group.column(column).total_uncompressed_size for group in groups]
    start = 0
    while start < len(sizes):
        end, size = start + 1, sizes[start]
        while end < len(sizes) and size + sizes[end] <= most_bytes:
            end, size = end + 1, size + sizes[end]
        yield start, end, size
        start = end


def _rows(path: Path, field: str, most_bytes: int) -> Iterator[tuple[int, int, int]]:
    """First, last and size of runs of rows."""
    from uoe_parallel.preprocessing.tables import open_dataset

    table = open_dataset(path, field)
    row_bytes = max(1, table.data.nbytes // max(1, len(table)))
    step = max(1, most_bytes // row_bytes)
    for start in range(0, len(table), step):
        end = min(start + step, len(table))
        yield start, end, (end - start) * row_bytes
