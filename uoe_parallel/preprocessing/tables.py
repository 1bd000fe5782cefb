"""Columns of text in Parquet files and in folders of Hugging Face datasets.

Their libraries are optional, and are imported when there is such a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uoe_parallel.errors import UserError

_BATCH_ROWS = 256
"""Rows that are in memory at a time."""


def parquet_texts(path: Path, field: str, start: int, end: int) -> Iterator[bytes | None]:
    """The texts of row groups `start` to `end` - 1, in UTF-8 unless the file is wrong about it;
    None for null."""
    with _readable(path), open_parquet(path, field) as table:
        groups = list(range(start, end))
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[field]):
            yield from _bytes_of(batch.column(0))


def dataset_texts(path: Path, field: str, start: int, end: int) -> Iterator[bytes | None]:
    """The texts of rows `start` to `end` - 1, as `parquet_texts` gives them."""
    rows = open_dataset(path, field).with_format("arrow").select(range(start, end))
    with _readable(path):
        for batch in rows.iter(_BATCH_ROWS):
            yield from _bytes_of(batch.column(field))


def open_parquet(path: Path, field: str) -> Any:
    """A pyarrow.parquet.ParquetFile with text in column `field`. Raises UserError."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _missing("pyarrow", path) from error
    with _readable(path):
        table = ParquetFile(path)
    _check_column(path, table.schema_arrow, field)
    return table


def open_dataset(path: Path, field: str) -> Any:
    """A datasets.Dataset with text in column `field`. Raises UserError."""
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise _missing("datasets", path) from error
    with _readable(path):
        table: Any = load_from_disk(str(path))
    _check_column(path, table.data.schema, field)
    return table


def open_zstd(path: Path) -> Any:
    """The contents of a file that is compressed by Zstandard, as a binary stream."""
    try:
        import pyarrow
    except ImportError as error:
        raise _missing("pyarrow", path) from error
    return pyarrow.input_stream(str(path), compression="zstd")


def _missing(package: str, path: Path) -> UserError:
    return UserError(
        f"{path}: needs the package {package} to be read; pip install 'uoe-parallel[data]'"
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises UserError for what pyarrow says of a file that it cannot read."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); copy it again or leave it out"
        ) from error


def _check_column(path: Path, schema: Any, field: str) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise UserError(
            f"{path}: has no column {field!r}, but {', '.join(schema.names)}; name the one with "
            "the text by --field"
        )
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(is_text(kind) for is_text in _text_types()):
        raise UserError(
            f"{path}: column {field!r} has {kind}, not text; name the one with the text by --field"
        )


def _text_types() -> tuple[Any, ...]:
    from pyarrow import types

    return (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
    )


def _bytes_of(column: Any) -> list[bytes | None]:
    # By way of binary: the conversion of text to Python raises at the first row that is no UTF-8.
    import pyarrow as pa

    return column.cast(pa.large_binary()).to_pylist()
