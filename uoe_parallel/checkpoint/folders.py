"""Names of checkpoint folders, and how they come and go without ever being half there.

Names are put in place and taken away by single renames, which the file system does wholly or
not at all; the slow work happens under names that are never read.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

PARTIAL = ".partial"
"""Being written or removed: never read, removed by the next save."""
REPLACED = ".replaced"
"""Whole, and moved aside while another checkpoint of the same step takes its place."""

_CHECKPOINT = re.compile(r"step-(\d{8,})(\.replaced)?")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder's name is that of a checkpoint."""
    return _CHECKPOINT.fullmatch(folder.name) is not None


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder's name tells."""
    match = _CHECKPOINT.fullmatch(folder.name)
    assert match, f"not a checkpoint folder: {folder}"
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders in `root`, newest first. Raises OSError."""
    if not root.exists():
        return []
    found = [path for path in root.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def remove_partials(root: Path) -> None:
    """Remove what earlier saves left behind when they were interrupted. Raises OSError."""
    for path in root.glob(f"*{PARTIAL}"):
        if _CHECKPOINT.fullmatch(path.name.removesuffix(PARTIAL)):
            shutil.rmtree(path)


def publish(partial: Path, final: Path) -> None:
    """Give a complete folder its final name, durably. Raises OSError.

    If the name is taken (a step that is reached again after falling back to an older
    checkpoint), its holder moves aside first: a folder that isn't empty can't be replaced.
    """
    fsync(partial)
    if final.exists():
        aside = final.with_name(final.name + REPLACED)
        if aside.exists():
            discard(aside)
        final.replace(aside)
    partial.replace(final)
    fsync(final.parent)


def discard(folder: Path) -> None:
    """Remove a checkpoint: first its name, then its files. Raises OSError."""
    partial = folder.with_name(folder.name + PARTIAL)
    folder.replace(partial)
    shutil.rmtree(partial)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
