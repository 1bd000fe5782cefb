"""Documents out of files: JSONL, plain text, Parquet, Hugging Face datasets."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, BinaryIO, NamedTuple, TypeVar

from uoe_parallel.errors import UserError
from uoe_parallel.preprocessing.spans import Reading, Span, cut, find_sources
from uoe_parallel.preprocessing.tables import dataset_texts, open_zstd, parquet_texts

Raw = TypeVar("Raw")

_READ_AT_ONCE = 32 * 2**20
"""Bytes of a piece where nobody asks for pieces."""


class Entry(NamedTuple):
    """A document, or a line or row that should have been one."""

    line: int
    """Where it begins: the line or row of its span, from 1."""
    text: str | None
    """At least one character, all of which UTF-8 can hold; None if there is no such text."""
    fault: str = ""
    """Why there is none."""


class _Bad(Exception):
    """There is no document here; the message says why."""


def read_texts(
    arguments: Iterable[str], reading: Reading, on_bad: Callable[[str], None]
) -> Iterator[str]:
    """The documents of everything that `arguments` name, in order.

    Lines without one are left out, and told to `on_bad` as `file: line or row: why`, the line
    counted from 1 in its file. Raises UserError for sources that cannot be found or read.
    """
    for source in find_sources(arguments, reading):
        lines = LineNumbers()
        for piece in cut(source, reading, _READ_AT_ONCE):
            for span in piece:
                reader = SpanReader(span, reading)
                for entry in reader:
                    if entry.text is None:
                        on_bad(lines.place(span, entry.line, entry.fault))
                    else:
                        yield entry.text
                lines.leave(span, reader.lines)


class LineNumbers:
    """Numbers of lines in their files, made of those in spans that come one after the other."""

    def __init__(self) -> None:
        self._before = 0
        """Lines of the last span's file up to its end."""

    def place(self, span: Span, line: int, fault: str) -> str:
        """`file:line: why`, of an entry of the span after the last one that was left."""
        return f"{span.file.path}:{line + self._lines_before(span)}: {fault}"

    def leave(self, span: Span, lines: int) -> None:
        """The span is over; it had so many lines."""
        self._before = self._lines_before(span) + lines

    def _lines_before(self, span: Span) -> int:
        return self._before if span.start else 0


class SpanReader:
    """The entries of a span, one after the other; what is in memory is one document, or a few
    hundred rows of a table.

    `for` over it raises UserError for a file that is damaged as a whole, or has gone.
    """

    def __init__(self, span: Span, reading: Reading) -> None:
        self._span = span
        self._reading = reading
        self.lines = 0
        """Lines or rows of the span that have been read so far."""

    def __iter__(self) -> Iterator[Entry]:
        span, reading = self._span, self._reading
        if span.file.format in ("parquet", "datasets"):
            assert span.end is not None
            texts_of = parquet_texts if span.file.format == "parquet" else dataset_texts
            cells = texts_of(span.file.path, reading.field, span.start, span.end)
            return _entries(self._counted(cells), self._text_of_cell)
        if span.file.format == "jsonl":
            return _entries(self._json_lines(), self._text_of_json)
        if reading.separator is not None:
            return _entries(self._separated(reading.separator.encode()), _unmarked)
        return _entries(self._whole_file(), _unmarked)

    def _counted(self, cells: Iterable[Raw]) -> Iterator[tuple[int, Raw]]:
        for cell in cells:
            self.lines += 1
            yield self.lines, cell

    def _json_lines(self) -> Iterator[tuple[int, bytes]]:
        for line, is_own in self._lines():
            if not is_own:
                return
            # Programs that end a file with an empty line are many.
            if not line.isspace():
                yield self.lines, line.rstrip()

    def _whole_file(self) -> Iterator[tuple[int, bytes]]:
        yield 1, b"".join(line for line, _ in self._lines())

    def _separated(self, separator: bytes) -> Iterator[tuple[int, bytes]]:
        """Text between lines of `separator`, which there need not be at the ends of the file."""
        first, document = 1, io.BytesIO()
        is_ours = self._span.start == 0
        for line, is_own in self._lines():
            if line.rstrip(b"\r\n") != separator:
                if is_ours:
                    document.write(line)
                elif not is_own:
                    return
                continue
            if is_ours and not (text := document.getvalue()).isspace() and text:
                yield first, text
            if not is_own:
                return
            first, document, is_ours = self.lines + 1, io.BytesIO(), True
        if is_ours and not (text := document.getvalue()).isspace() and text:
            yield first, text

    def _lines(self) -> Iterator[tuple[bytes, bool]]:
        """The lines of the file from the first one that begins in the span on, and whether they
        still do."""
        span = self._span
        try:
            with closing(_open(span)) as stream:
                position = span.start
                if position:
                    stream.seek(position - 1)
                    position += len(stream.readline()) - 1
                for line in stream:
                    is_own = span.end is None or position < span.end
                    self.lines += is_own
                    position += len(line)
                    yield line, is_own
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{span.file.path}: cannot be read ({error}); copy it again or leave it out"
            ) from error

    def _text_of_json(self, line: bytes) -> str:
        field = self._reading.field
        try:
            value = json.loads(_unmarked(line))
        except json.JSONDecodeError as error:
            raise _Bad(f"no JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise _Bad(f"no JSON that can be read: {error}") from error
        if not isinstance(value, dict):
            raise _Bad(f"{_kind(value)}, not a JSON object")
        if field not in value:
            raise _Bad(f"no field {field!r}")
        return self._checked(value[field])

    def _text_of_cell(self, cell: bytes | None) -> str:
        return self._checked(None if cell is None else _decoded(cell))

    def _checked(self, value: Any) -> str:
        if not isinstance(value, str):
            raise _Bad(f"{self._reading.field!r} is {_kind(value)}, not text")
        return value


def _entries(raws: Iterable[tuple[int, Raw]], text_of: Callable[[Raw], str]) -> Iterator[Entry]:
    for line, raw in raws:
        try:
            text = text_of(raw)
            if not text:
                raise _Bad("empty text")
            _check_characters(text)
        except _Bad as bad:
            yield Entry(line, None, str(bad))
        else:
            yield Entry(line, text)


def _open(span: Span) -> BinaryIO:
    path = span.file.path
    if path.suffix == ".gz":
        return gzip.open(path)  # pyright: ignore[reportReturnType]
    if path.suffix == ".zst":
        return io.BufferedReader(open_zstd(path))  # pyright: ignore[reportReturnType]
    return path.open("rb")


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        byte = text[error.start]
        raise _Bad(f"no UTF-8: byte {error.start + 1} is 0x{byte:02x}") from error


def _unmarked(text: bytes) -> str:
    """UTF-8, without the mark of it that some programs begin a file with."""
    return _decoded(text.removeprefix(codecs.BOM_UTF8))


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = ord(text[error.start])
        raise _Bad(f"no text: half a character, \\u{lone:04x}, at {error.start + 1}") from error


def _kind(value: Any) -> str:
    """What JSON calls a value that is not text."""
    names = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), "text" if isinstance(value, str) else "a number")
