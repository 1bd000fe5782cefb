"""Manifests: pieces must tile, and a text that was tampered with is not believed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uoe_parallel.checkpoint.manifest import FileRecord, seal, tiling_fault, unseal

Box = tuple[tuple[int, ...], tuple[int, ...]]


def _fields(**changes: Any) -> dict[str, Any]:
    file = "rank-00000.safetensors"
    piece = {"file": file, "tensor": "w@0", "offsets": [0], "shape": [4]}
    return {
        "step": 3,
        "state": {
            "loss": 0.1,
            "seed": 2**80,
            "name": "\N{SNOWMAN}",
            "none": None,
            "list": [1, [2]],
        },
        "files": {file: {"size": 8, "sha256": "00"}},
        "entries": {"w": {"dtype": "float32", "shape": [4], "pieces": [piece]}},
    } | changes


def _with_file(name: str) -> dict[str, Any]:
    text = json.dumps(_fields())
    return json.loads(text.replace('"rank-00000.safetensors"', json.dumps(name)))


@st.composite
def _boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes in it that tile it by chance or not at all."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        offsets = tuple(draw(st.integers(0, size)) for size in shape)
        room = zip(shape, offsets, strict=True)
        boxes.append((offsets, tuple(draw(st.integers(0, s - o)) for s, o in room)))
    return shape, boxes


@given(_boxes())
def test_tiling_is_every_index_once(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    times = np.zeros(shape, dtype=int)
    for offsets, sizes in boxes:
        ranges = [range(o, o + s) for o, s in zip(offsets, sizes, strict=True)]
        for index in itertools.product(*ranges):
            times[index] += 1
    assert (tiling_fault(shape, boxes) is None) == bool((times == 1).all())


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (1, 4))], "hole"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "overlap"),
        ([((0, 0), (4, 5))], "leaves the tensor"),
        ([((0,), (4,))], r"piece at \(0,\)"),
        ([], "hole"),
    ],
)
def test_bad_tilings_say_why_and_make_no_manifest(boxes: list[Box], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        raise ValueError(tiling_fault((4, 4), boxes))
    file = "rank-00000.safetensors"
    pieces = [{"file": file, "tensor": "w", "offsets": o, "shape": s} for o, s in boxes]
    with pytest.raises(ValueError, match=fault):
        seal(_fields(entries={"w": {"dtype": "float32", "shape": [4, 4], "pieces": pieces}}))


def test_sealed_fields_come_back() -> None:
    manifest = unseal(seal(_fields()))
    assert (manifest.step, manifest.state) == (3, _fields()["state"])
    assert manifest.entries["w"].pieces[0].offsets == (0,)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"step":3', '"step":4', "checksum"),
        ("0.1", "0.2", "checksum"),
        ('"sha256":"', '"sha":"', "another kind"),
        ("{", "", "Extra data"),
    ],
)
def test_edited_manifest_is_refused(old: str, new: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        unseal(seal(_fields()).replace(old, new))


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"\xff\x00", b"[" * 100_000, b'{"manifest":1}']
)
def test_garbage_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"line 1 column 1|another kind|can't decode"):
        unseal(text)


@pytest.mark.parametrize(
    "name",
    [
        *("../rank-00000.safetensors", "/tmp/rank-00000.safetensors", "a/rank-00000.safetensors"),
        *("rank-00000.safetensors\n", "rank-00000.safetensors\0", "rank-00000.pt", "", ".."),
    ],
)
def test_file_names_are_flat_shard_names(name: str) -> None:
    with pytest.raises(ValueError, match="files"):
        seal(_with_file(name))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"unknown": 1}, "unknown"),
        ({"step": -1}, "step"),
        ({"step": "3"}, "step"),
        ({"files": {}}, "listed or used, not both"),
        ({"state": {"loss": float("nan")}}, "JSON compliant"),
        ({"entries": {"w": {"dtype": "load", "shape": [0], "pieces": []}}}, "dtype 'load'"),
    ],
)
def test_fields_of_another_kind_are_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        seal(_fields(**changes))


def test_file_record_tells_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    record = FileRecord.of(path)
    assert record.fault(path) is None
    path.write_bytes(b"12345679")
    assert record.size_fault(path) is None
    assert record.fault(path) == "file does not match its checksum"
    path.write_bytes(b"1234567")
    assert record.fault(path) == "file has 7 bytes instead of 8"
    path.unlink()
    assert record.fault(path) == "file: No such file or directory"
