"""The manifest: what a checkpoint holds, in which files, and how to tell that they are whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

MANIFEST_NAME = "manifest.json"

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}

# One flat name and nothing else, so that no manifest can point outside its own folder.
FileName = Annotated[str, Field(pattern=r"^rank-[0-9]{5,}\.safetensors$")]
Sizes = tuple[NonNegativeInt, ...]


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileRecord(_Record):
    """A shard file as it was written."""

    size: NonNegativeInt
    """Bytes."""
    # SHA-256 because hashlib streams a file through it in one call without holding the GIL, at
    # 1 to 2 GB/s where the CPU has instructions for it (a rank's share of a disk is slower), and
    # because `sha256sum` checks a file by hand. CRC-32 is about twice as fast, but 32 bits are
    # few for petabytes, and BLAKE2 is slower than both.
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read the whole file. Raises OSError."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return cls(size=file.tell(), sha256=digest.hexdigest())

    def size_fault(self, path: Path) -> str | None:
        """What is wrong with the file at first sight, None if nothing is."""
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path.name}: {error.strerror}"
        if size != self.size:
            return f"{path.name} has {size} bytes instead of {self.size}"
        return None

    def fault(self, path: Path) -> str | None:
        """What is wrong with the file, None if it is as it was written. Reads all of it."""
        if fault := self.size_fault(path):
            return fault
        try:
            same = FileRecord.of(path) == self
        except OSError as error:
            return f"{path.name}: {error.strerror}"
        return None if same else f"{path.name} does not match its checksum"


class PieceRecord(_Record):
    """A box of an entry, and where its values are."""

    file: FileName
    tensor: str
    """Key in the safetensors file."""
    offsets: Sizes
    """First index of the box in each dimension of the entry."""
    shape: Sizes


class Entry(_Record):
    """One tensor of the run, whole: a weight, a moment, a random state."""

    dtype: str
    shape: Sizes
    """The global shape, which the pieces tile."""
    pieces: tuple[PieceRecord, ...]

    @model_validator(mode="after")
    def _check(self) -> Entry:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}")
        if fault := tiling_fault(self.shape, [(p.offsets, p.shape) for p in self.pieces]):
            raise ValueError(fault)
        return self


class Manifest(_Record):
    """All that is known of a checkpoint but the values."""

    format: Literal["uoe-parallel"] = "uoe-parallel"
    version: Literal[1] = 1
    step: NonNegativeInt
    state: dict[str, JsonValue]
    files: dict[FileName, FileRecord]
    entries: dict[str, Entry]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        used = {piece.file for entry in self.entries.values() for piece in entry.pieces}
        if used != set(self.files):
            raise ValueError(f"files {sorted(used ^ set(self.files))} are listed or used, not both")
        return self


def tiling_fault(shape: Sequence[int], boxes: Iterable[tuple[Sizes, Sizes]]) -> str | None:
    """Why boxes of (offsets, shape) do not cover every index of `shape` once, None if they do."""
    boxes = list(boxes)
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return f"piece at {offsets} of shape {sizes} in a tensor of shape {tuple(shape)}"
        if any(o + s > whole for o, s, whole in zip(offsets, sizes, shape, strict=True)):
            return f"piece at {offsets} of shape {sizes} leaves the tensor of {tuple(shape)}"
    # All boundaries of all boxes cut the tensor into cells that a box holds wholly or not at all.
    places: list[dict[int, int]] = []
    for dim, whole in enumerate(shape):
        cuts = {0, whole}
        for offsets, sizes in boxes:
            cuts |= {offsets[dim], offsets[dim] + sizes[dim]}
        places.append({cut: place for place, cut in enumerate(sorted(cuts))})
    covered = np.zeros([len(place) - 1 for place in places], dtype=np.int32)
    for offsets, sizes in boxes:
        cells = zip(places, offsets, sizes, strict=True)
        covered[tuple(slice(place[o], place[o + s]) for place, o, s in cells)] += 1
    if (covered == 0).any():
        return f"the pieces leave a hole in the tensor of shape {tuple(shape)}"
    if (covered > 1).any():
        return f"pieces overlap in the tensor of shape {tuple(shape)}"
    return None


def seal(fields: Mapping[str, Any]) -> str:
    """The text of manifest.json for the given fields of a Manifest.

    Raises ValueError or TypeError where they make no valid manifest, such as pieces that leave
    a hole, or a state that holds something else than finite JSON.
    """
    body = _canonical(fields)
    manifest = _canonical(Manifest.model_validate_json(body).model_dump())
    return f'{{"manifest":{manifest},"sha256":"{_digest(manifest)}"}}'


def unseal(text: str | bytes) -> Manifest:
    """Read the text of manifest.json. Raises ValueError with a one-line reason if it is damaged."""
    try:
        sealed = json.loads(text)
        body = _canonical(sealed["manifest"])
        if sealed["sha256"] != _digest(body):
            raise ValueError("it does not match its own checksum")
        return Manifest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is JSON of another kind") from error


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
