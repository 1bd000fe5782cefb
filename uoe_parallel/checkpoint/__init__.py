"""Checkpoints on disk: safetensors shards and a JSON manifest of global shapes.

    checkpoints/
        step-00000100/
            rank-00000.safetensors   what rank 0 wrote; ranks with nothing to write have no file
            rank-00001.safetensors
            manifest.json            every entry's global shape and pieces, every file's checksum
        step-00000200.partial/       being written or removed; never read

A folder that bears its final name was complete when it got it. Nothing here knows of models or
optimizers: an entry is a key, a global shape and the pieces that tile it, so that any layout
reads what any other wrote. Files that the manifest does not list are never opened, and no format
in use can carry code.
"""

from __future__ import annotations

from uoe_parallel.checkpoint.reader import (
    CheckpointReader,
    find_checkpoint,
    locate_checkpoint,
    open_checkpoint,
    read_manifest,
)
from uoe_parallel.checkpoint.store import Piece, save_checkpoint, save_in_parts

__all__ = [
    "CheckpointReader",
    "Piece",
    "find_checkpoint",
    "locate_checkpoint",
    "open_checkpoint",
    "read_manifest",
    "save_checkpoint",
    "save_in_parts",
]
