"""A corpus that every machine has: the source of Python's own standard library.

The files are split by the hash of their path, so that a file keeps its side when others come or
go, and no text of one file is on two sides.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from uoe_parallel.data.tokenizer import ByteTokenizer
from uoe_parallel.errors import UserError

SPLITS = ("train", "validation", "test")
SPLIT_RULE = (
    "whole files, by SHA-256 of the path below the source folder, modulo 20: "
    "0 validation, 1 test, the others train (about 5, 5 and 90 % of the files)"
)
_SUMMARY_NAME = "corpus.json"
# Installed packages are not the standard library. Tests are mostly literal test data, and
# `encodings` and `pydoc_data` tables made by programs: little of it reads like code.
_SKIPPED_FOLDERS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
    ]
)
_DTYPE = np.uint16


@dataclass(frozen=True)
class SplitSummary:
    """The size of one split. `tokens` counts the bytes and one end of document per file."""

    files: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class CorpusSummary:
    """What a corpus folder holds; corpus.json is this without `folder` and `reused`."""

    folder: Path
    reused: bool
    """Whether the folder held exactly this corpus already."""
    splits: dict[str, SplitSummary]
    split_rule: str
    tokenizer: str
    python: str
    fingerprint: str
    """SHA-256 of everything that decides a byte of the corpus: rules and source text."""

    def describe(self) -> str:
        """A few lines for people: what was found or built, where, and how it is split."""
        verb = "found and reused" if self.reused else "built"
        lines = [
            f"corpus {verb}: {self.folder} (Python {self.python}'s own source, byte by byte)",
            f"split: {self.split_rule}",
        ]
        for name, split in self.splits.items():
            lines.append(f"  {name:<10} {split.files:>5} files {split.tokens:>11,} tokens")
        return "\n".join(lines)


def build_stdlib_corpus(folder: Path, source: Path | None = None) -> CorpusSummary:
    """Make `folder` hold the corpus of `source`, as train, validation and test .bin/.idx pairs.

    Every UTF-8 .py file below `source` (the running interpreter's standard library unless
    given) becomes one document that ends with the end-of-document token. A folder that already
    holds this very corpus is left alone; one that holds another build of it is replaced, at
    once and only when the new one is complete.

    Raises UserError when `source` has too few files to fill every split, or when `folder` holds
    anything that is not a corpus of this function.
    """
    folder = folder.resolve()
    source = source or Path(sysconfig.get_path("stdlib"))
    _refuse_foreign_files(folder)
    documents: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    digest = hashlib.sha256()
    for part in ("bytes", SPLIT_RULE, platform.python_version()):
        digest.update(part.encode() + b"\0")
    for path, text in _python_files(source):
        documents[split_of(path)].append(text)
        digest.update(f"{path}\0{len(text)}\0".encode() + text)
    _refuse_empty_splits(source, documents)
    summary = CorpusSummary(
        folder=folder,
        reused=False,
        splits={name: _measure(texts) for name, texts in documents.items()},
        split_rule=SPLIT_RULE,
        tokenizer="bytes",
        python=platform.python_version(),
        fingerprint=digest.hexdigest(),
    )
    if _holds(folder, summary):
        return CorpusSummary(**{**vars(summary), "reused": True})
    _write(summary, documents)
    return summary


def split_of(path: PurePosixPath) -> str:
    """The split of the file at `path` (relative to the source folder)."""
    bucket = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:8], "big") % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def _python_files(source: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Relative path and text of the usable files, sorted by path."""
    found = ((PurePosixPath(p.relative_to(source).as_posix()), p) for p in source.rglob("*.py"))
    for relative, path in sorted(found):
        # _sysconfigdata_*.py is the machine's build settings.
        generated = relative.name.startswith("_sysconfigdata")
        if generated or _SKIPPED_FOLDERS & set(relative.parts) or not path.is_file():
            continue
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield relative, text


def _measure(texts: list[bytes]) -> SplitSummary:
    size = sum(map(len, texts))
    return SplitSummary(files=len(texts), bytes=size, tokens=size + len(texts))


def _refuse_foreign_files(folder: Path) -> None:
    """Replacing a folder deletes it, which must never happen to anything but a corpus."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder for the corpus")
    ours = {_SUMMARY_NAME, *(f"{name}.{end}" for name in SPLITS for end in ("bin", "idx"))}
    others = sorted({p.name for p in folder.iterdir()} - ours) if folder.exists() else []
    if others:
        raise UserError(
            f"{folder}: holds {others[0]!r}, which is no part of a corpus; name a folder that is "
            "empty or does not exist yet"
        )


def _refuse_empty_splits(source: Path, documents: dict[str, list[bytes]]) -> None:
    empty = [name for name, texts in documents.items() if not texts]
    if empty:
        count = sum(map(len, documents.values()))
        raise UserError(
            f"{source}: {count} usable Python source files, none of them for {', '.join(empty)}; "
            "use a Python that comes with the source of its standard library"
        )


def _record(summary: CorpusSummary) -> dict[str, object]:
    """What corpus.json says."""
    record = asdict(summary)
    del record["folder"], record["reused"]
    return record


def _holds(folder: Path, summary: CorpusSummary) -> bool:
    """Whether `folder` holds the corpus that `summary` describes, with data of the right size."""
    try:
        record = json.loads((folder / _SUMMARY_NAME).read_text("utf-8"))
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in SPLITS}
    except (OSError, ValueError):
        return False
    whole = all(
        sizes[name] == split.tokens * np.dtype(_DTYPE).itemsize
        and (folder / f"{name}.idx").is_file()
        for name, split in summary.splits.items()
    )
    return whole and record == _record(summary)


def _write(summary: CorpusSummary, documents: dict[str, list[bytes]]) -> None:
    """Build beside the folder and rename, so that the folder is never half of a corpus."""
    folder = summary.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        staging = Path(temporary, "new")
        staging.mkdir()
        for name, texts in documents.items():
            _write_split(staging / name, texts)
        text = json.dumps(_record(summary), indent=2) + "\n"
        (staging / _SUMMARY_NAME).write_text(text, "utf-8")
        if folder.exists():
            folder.rename(Path(temporary, "old"))
        staging.rename(folder)


def _write_split(prefix: Path, texts: list[bytes]) -> None:
    # Imported here because a corpus that is found and reused need not wait seconds for them.
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = ByteTokenizer()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=_DTYPE)
    for text in texts:
        ids = np.append(tokenizer.encode(text), tokenizer.eod)
        builder.add_item(torch.from_numpy(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
