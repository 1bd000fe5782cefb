"""Corpora of the user's texts: bytes, with held-out pieces from all over each."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

from uoe_parallel.data.tokenizer import build_tokenizer
from uoe_parallel.errors import UserError

PIECES = 40
"""That each text is cut into, at line ends: a document each."""
HELD_OUT = {8: "validation", 18: "test"}
"""Where pieces go, by their number modulo 20; the others are for training."""


def make_corpora(texts: Sequence[Path], folder: Path) -> dict[str, str]:
    """Cut `texts` into corpora of bytes in a folder of `folder` that has their checksum for a name,
    or find them there. Their prefixes by "train", "validation" and "test".

    Of 20 neighbouring pieces of a text, 18 are for training: what is held out is of the same kind,
    and lies between what is trained on. Raises UserError for a text that can't be read or is too
    short to cut.
    """
    contents = {path: _read(path) for path in texts}
    digest = hashlib.sha256()
    for content in contents.values():
        digest.update(hashlib.sha256(content).digest())
    made = folder / f"text-{digest.hexdigest()[:12]}"
    parts = {name: str(made / name) for name in ("train", *HELD_OUT.values())}
    if made.is_dir():
        return parts
    partial = folder / f"{made.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pieces = {name: list[bytes]() for name in parts}
    for path, content in contents.items():
        for number, piece in enumerate(_cut(path, content)):
            pieces[HELD_OUT.get(number % 20, "train")].append(piece)
    for name, documents in pieces.items():
        _write(partial / name, documents)
    partial.rename(made)
    return parts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--text {path}: {(error.strerror or str(error)).lower()}") from None


def _cut(path: Path, content: bytes) -> list[bytes]:
    """Into `PIECES` of about equal size, each of whole lines."""
    lines = content.splitlines(keepends=True)
    if len(lines) >= PIECES:
        ends = np.cumsum([len(line) for line in lines])
        wanted = np.linspace(0, len(content), PIECES + 1)[1:-1]
        inner = (int(ends[np.searchsorted(ends, place)]) for place in wanted)
        places = [0, *inner, len(content)]
        pieces = [content[a:b] for a, b in pairwise(places) if b > a]
        if len(pieces) == PIECES:
            return pieces
    raise UserError(
        f"--text {path}: {len(content)} bytes in {len(lines)} lines can't be cut into {PIECES} "
        "pieces of whole lines; give it a longer text with shorter lines"
    )


def _write(prefix: Path, documents: Sequence[bytes]) -> None:
    tokenizer = build_tokenizer("bytes")
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    for document in documents:
        builder.add_item(torch.tensor([*tokenizer.encode(document), tokenizer.eod]))
        builder.end_document()
    builder.finalize(get_idx_path(str(prefix)))
