"""Finding the newest whole checkpoint, or a given step's, and reading any box of any entry."""

from __future__ import annotations

import logging
from collections.abc import KeysView, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors import safe_open
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.checkpoint import folders
from uoe_parallel.checkpoint.manifest import DTYPES, MANIFEST_NAME, Manifest, unseal
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.agreement import broadcast_json, gather_json, rank_in, shared_fate

logger = logging.getLogger(__name__)

_FAULTS_TOLD = 3


class CheckpointReader:
    """A checkpoint that was found whole. Reading is not collective: each rank takes its boxes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        self._files: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def state(self) -> dict[str, JsonValue]:
        """What was passed as `state` when it was saved."""
        return self._manifest.state

    def keys(self) -> KeysView[str]:
        return self._manifest.entries.keys()

    def dtype(self, key: str) -> torch.dtype:
        return DTYPES[self._manifest.entries[key].dtype]

    def shape(self, key: str) -> tuple[int, ...]:
        """The global shape of an entry."""
        return self._manifest.entries[key].shape

    def read(
        self, key: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """A new CPU tensor with the box of `shape` that begins at `offsets` of the entry `key`.

        Without offsets and shape, the whole entry. Only what overlaps the box is read. Raises
        OSError if a file has gone since it was found whole.
        """
        entry = self._manifest.entries[key]
        offsets = (0,) * len(entry.shape) if offsets is None else offsets
        shape = entry.shape if shape is None else shape
        assert len(offsets) == len(shape) == len(entry.shape), f"{key}: {offsets}, {shape}"
        assert all(
            first >= 0 and size >= 0 and first + size <= whole
            for first, size, whole in zip(offsets, shape, entry.shape, strict=True)
        ), f"{key}: {shape} at {tuple(offsets)} leaves {entry.shape}"
        box = torch.empty(tuple(shape), dtype=self.dtype(key))
        for piece in entry.pieces:
            spans = [
                _overlap(*edges)
                for edges in zip(offsets, shape, piece.offsets, piece.shape, strict=True)
            ]
            if all(size > 0 for _, _, size in spans):
                target = tuple(slice(to, to + size) for to, _, size in spans)
                source = tuple(slice(at, at + size) for _, at, size in spans)
                box[target] = self._open(piece.file).get_slice(piece.tensor)[source]
        return box

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="pt")
        return self._files[file]


def find_checkpoint(root: Path, group: ProcessGroup | None) -> CheckpointReader | None:
    """The newest whole checkpoint in `root`, the same on every rank; None if there is none at all.

    Collective over `group` (see `agreement`), whose ranks share the work of reading every file
    once to compare checksums. Rank 0 logs a warning for each damaged checkpoint that is passed
    over. Raises UserError on every rank if there are checkpoints and all of them are damaged.
    """
    reader, problems = _first_whole(root, _names(root, group), group)
    if rank_in(group) == 0:
        for problem in problems:
            logger.warning("passing over a damaged checkpoint in %s: %s", root, problem)
    if reader is None and problems:
        raise UserError(
            f"no checkpoint in {root} is whole ({'; '.join(problems)}). Bring one back from a "
            "copy, or move the folder away to start from the first step"
        )
    return reader


def open_checkpoint(root: Path, step: int, group: ProcessGroup | None) -> CheckpointReader:
    """The checkpoint of `step` in `root`, the same on every rank. Collective as `find_checkpoint`.

    Raises UserError on every rank if it is not there or not whole.
    """
    names = [name for name in _names(root, group) if folders.step_of(Path(name)) == step]
    reader, problems = _first_whole(root, names, group)
    if reader is None:
        found = f"is not whole ({'; '.join(problems)})" if problems else "is not there"
        raise UserError(f"{root / folders.folder_name(step)} {found}")
    return reader


def locate_checkpoint(path: Path, group: ProcessGroup | None) -> CheckpointReader:
    """The checkpoint at `path`, or the newest whole one if that is a run folder or a folder of
    checkpoints. Collective as `find_checkpoint`. Raises UserError on every rank."""
    root, step = _place(path)
    reader = find_checkpoint(root, group) if step is None else open_checkpoint(root, step, group)
    if reader is None:
        raise _absent(path)
    return reader


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`, as `locate_checkpoint` takes it: of the newest one
    whose manifest is whole, with its files not looked at. Not collective. Raises UserError."""
    root, step = _place(path)
    try:
        found = folders.list_checkpoints(root)
        for folder in found if step is None else [root / folders.folder_name(step)]:
            try:
                return unseal((folder / MANIFEST_NAME).read_bytes())
            except ValueError:
                continue
    except OSError as error:
        raise UserError(f"{path}: no checkpoint can be read there ({error.strerror})") from error
    raise _absent(path)


def _place(path: Path) -> tuple[Path, int | None]:
    """The folder of checkpoints, and the step of one."""
    if folders.is_checkpoint(path):
        return path.parent, folders.step_of(path)
    inside = path / "checkpoints"
    return (inside if inside.is_dir() else path), None


def _absent(path: Path) -> UserError:
    return UserError(
        f"{path}: holds no whole checkpoint; name a run folder with checkpoints/, or one of its "
        "checkpoints/step-..."
    )


def _names(root: Path, group: ProcessGroup | None) -> list[str]:
    """The names of the checkpoint folders as rank 0 sees them, newest first, on every rank."""
    names: list[str] = []
    with shared_fate(f"can't look for checkpoints in {root}", "See that it can be read", group):
        if rank_in(group) == 0:
            names = [path.name for path in folders.list_checkpoints(root)]
    return broadcast_json(names, group)


def _first_whole(
    root: Path, names: Sequence[str], group: ProcessGroup | None
) -> tuple[CheckpointReader | None, list[str]]:
    """The first whole one of the named folders, and what is wrong with those before it."""
    problems: list[str] = []
    for name in names:
        manifest, faults = _verify(root / name, group)
        if manifest and not faults:
            return CheckpointReader(root / name, manifest), problems
        more = f" and {len(faults) - _FAULTS_TOLD} more" if len(faults) > _FAULTS_TOLD else ""
        problems.append(f"{name}: {', '.join(faults[:_FAULTS_TOLD])}{more}")
    return None, problems


def _verify(folder: Path, group: ProcessGroup | None) -> tuple[Manifest | None, list[str]]:
    """The manifest as rank 0 read it, and all ranks' faults; the same on every rank."""
    text, fault = "", ""
    if rank_in(group) == 0:
        try:
            text = (folder / MANIFEST_NAME).read_text()
            unseal(text)
        except OSError as error:
            fault = f"{MANIFEST_NAME}: {error.strerror}"
        except ValueError as error:
            fault = f"{MANIFEST_NAME} is damaged: {error}"
    text, fault = broadcast_json([text, fault], group)
    if fault:
        return None, [fault]
    manifest = unseal(text)
    rank, ranks = (group.rank(), group.size()) if group else (0, 1)
    mine = sorted(manifest.files)[rank::ranks]
    faults = [manifest.files[name].fault(folder / name) for name in mine]
    gathered = [fault for part in gather_json([f for f in faults if f], group) for fault in part]
    if manifest.step != folders.step_of(folder):
        gathered.append(f"it holds step {manifest.step}")
    return manifest, broadcast_json(gathered, group)


def _overlap(first: int, size: int, piece_first: int, piece_size: int) -> tuple[int, int, int]:
    """In one dimension, where a piece meets a box: index in the box, in the piece, and length."""
    start = max(first, piece_first)
    end = min(first + size, piece_first + piece_size)
    return start - first, start - piece_first, end - start
