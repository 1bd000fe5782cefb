"""Writing checkpoints: every rank its shard, rank 0 the manifest, then one rename."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.checkpoint import folders
from uoe_parallel.checkpoint.manifest import (
    DTYPES,
    MANIFEST_NAME,
    FileRecord,
    seal,
    shard_name,
    unseal,
)
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.agreement import broadcast_json, gather_json, rank_in, shared_fate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, held by the one rank that is to write it.

    Replicated tensors are passed by one rank only. State of a single rank, such as its random
    state, is an entry of its own with the rank in its key.
    """

    key: str
    """Names the entry, the same on every rank, such as "layers.0.norm.weight/exp_avg"."""
    tensor: Tensor
    """Contiguous, on the CPU, of a dtype in manifest.DTYPES."""
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """Index of the box's first element in the global tensor."""

    @classmethod
    def whole(cls, key: str, tensor: Tensor) -> Piece:
        """The only piece of its entry."""
        return cls(key, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def save_checkpoint(
    root: Path,
    step: int,
    pieces: Sequence[Piece],
    state: Mapping[str, JsonValue],
    group: ProcessGroup | None,
    keep: int | None,
) -> Path:
    """Save a checkpoint to `root`/step-<step> and return that folder. Collective over `group`.

    root: on a file system that all ranks share. pieces: of this rank, maybe none; over all
    ranks they tile each entry exactly. state: small, finite JSON, rank 0's counts. group: see
    `agreement`. keep: how many of the newest whole checkpoints up to this one stay; newer ones,
    which only a run that has fallen back leaves ahead of itself, stay as well. None: all stay.

    Whenever this is interrupted, the checkpoints that were whole before remain so. Raises
    UserError on every rank when any can't write, after which no half of it is left.
    """
    assert (keep is None or keep >= 1) and step >= 0
    final = root / folders.folder_name(step)
    partial = final.with_name(final.name + folders.PARTIAL)
    rank = rank_in(group)
    together = functools.partial(
        shared_fate,
        action=f"the checkpoint of step {step} could not be saved to {root}",
        mend="Earlier checkpoints are untouched: see that every node reaches this folder, may "
        "write to it and has room there, then start again to resume",
        group=group,
    )
    try:
        with together():
            if rank == 0:
                root.mkdir(parents=True, exist_ok=True)
                folders.remove_partials(root)
                partial.mkdir()
        with together():
            report = _write_shard(partial / shard_name(rank), pieces)
        reports = gather_json(report, group)
        with together():
            if rank == 0:
                _write_manifest(partial, step, state, reports)
                folders.publish(partial, final)
    except (UserError, AssertionError):
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        # Nobody leaves before it is gone: a rank that exits may take the whole launch with it.
        broadcast_json(None, group)
        raise
    if rank == 0:
        _prune(final, keep)
    return final


def save_in_parts(
    root: Path, step: int, parts: Iterable[Sequence[Piece]], state: Mapping[str, JsonValue]
) -> Path:
    """As `save_checkpoint`, by one process that makes pieces part after part and holds one at a
    time: each becomes a file. Raises UserError when they can't be written, and what making them
    raises; no half of the checkpoint is left then.
    """
    final = root / folders.folder_name(step)
    partial = final.with_name(final.name + folders.PARTIAL)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folders.remove_partials(root)
        partial.mkdir()
        written = enumerate(parts)
        reports = [_write_shard(partial / shard_name(n), pieces) for n, pieces in written]
        _write_manifest(partial, step, state, reports)
        folders.publish(partial, final)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint could not be saved to {root}: {error}. See that this folder may be "
            "written to and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _write_shard(path: Path, pieces: Sequence[Piece]) -> dict[str, Any] | None:
    """Write this rank's file; returns its record and, by key, its part of each entry."""
    if not pieces:
        return None
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    starts: set[int] = set()
    for piece in pieces:
        name = f"{piece.key}@{','.join(map(str, piece.offsets))}"
        tensor = piece.tensor.detach()
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert tensor.is_contiguous() and tensor.device.type == "cpu", f"{name}: {tensor.device}"
        assert dtype in DTYPES and name not in tensors, f"{name} of {dtype}"
        # safetensors refuses tensors that share memory, but two entries may well be one tensor
        # (weights and masters of an fp32 run).
        tensors[name] = tensor.clone() if tensor.data_ptr() in starts else tensor
        starts.add(tensor.data_ptr())
        part = {"dtype": dtype, "shape": list(piece.global_shape), "pieces": []}
        place = {"offsets": list(piece.offsets), "shape": list(tensor.shape)}
        entry = entries.setdefault(piece.key, part)
        assert _kind(entry) == _kind(part), f"{name}: {_kind(entry)} and {_kind(part)}"
        entry["pieces"].append({"file": path.name, "tensor": name, **place})
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors lets nobody but the owner read
    folders.fsync(path)
    return {"file": path.name, "record": FileRecord.of(path).model_dump(), "entries": entries}


def _write_manifest(
    folder: Path, step: int, state: Mapping[str, JsonValue], reports: list[dict[str, Any] | None]
) -> None:
    files: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    for report in filter(None, reports):
        files[report["file"]] = report["record"]
        for key, part in report["entries"].items():
            entry = entries.setdefault(key, {**part, "pieces": []})
            assert _kind(entry) == _kind(part), f"{key}: {_kind(entry)} and {_kind(part)}"
            entry["pieces"] += part["pieces"]
    path = folder / MANIFEST_NAME
    path.write_text(seal({"step": step, "state": dict(state), "files": files, "entries": entries}))
    folders.fsync(path)


def _kind(entry: dict[str, Any]) -> tuple[str, list[int]]:
    return entry["dtype"], entry["shape"]


def _prune(saved: Path, keep: int | None) -> None:
    """Remove the checkpoints older than the newest `keep` whole ones, `saved` the first of them;
    with None, only what `saved` took the place of.

    A checkpoint counts when its files have their right sizes: reading them all at every save
    would cost too much. One that turns out damaged never counts against the one just saved.
    """
    whole = 0
    step = folders.step_of(saved)
    try:
        for folder in folders.list_checkpoints(saved.parent):
            if folders.step_of(folder) > step:
                continue
            twin = folders.step_of(folder) == step and folder != saved
            if twin or whole == keep:
                folders.discard(folder)
            elif keep is not None:
                whole += folder == saved or _looks_whole(folder)
    except OSError as error:
        # The new checkpoint is safe: not worth stopping a run for.
        logger.warning("old checkpoints stay in %s: %s", saved.parent, error)


def _looks_whole(folder: Path) -> bool:
    try:
        manifest = unseal((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return not any(record.size_fault(folder / name) for name, record in manifest.files.items())
