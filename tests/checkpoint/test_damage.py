"""Damaged checkpoints are noticed, named and passed over, and nothing in them is ever run."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.examples import found, save
from uoe_parallel.checkpoint import find_checkpoint, manifest
from uoe_parallel.errors import UserError

SHARD = "rank-00000.safetensors"


def _truncate(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1])


def _flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)


def _lose_the_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def _lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _garble_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(bytes(range(256)))


def _truncate_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def _edit_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert '"tokens":20' in text
    (folder / "manifest.json").write_text(text.replace('"tokens":20', '"tokens":21'))


def _point_outside(folder: Path) -> None:
    """A manifest that is consistent in itself and names a whole file of another folder."""
    body = json.loads((folder / "manifest.json").read_text())["manifest"]
    text = json.dumps(body).replace(SHARD, f"../step-00000001/{SHARD}")
    body = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    sealed = {"manifest": json.loads(body), "sha256": manifest._digest(body)}
    (folder / "manifest.json").write_text(json.dumps(sealed))


def _copy_another_step(folder: Path) -> None:
    other = folder.with_name("step-00000001")
    for name in (SHARD, "manifest.json"):
        (folder / name).write_bytes((other / name).read_bytes())


DAMAGES = {
    _truncate: f"{SHARD} has 247 bytes instead of 248",
    _flip_a_bit: f"{SHARD} does not match its checksum",
    _lose_the_shard: f"{SHARD}: No such file",
    _lose_the_manifest: "manifest.json: No such file",
    _garble_the_manifest: "manifest.json is damaged",
    _truncate_the_manifest: "manifest.json is damaged",
    _edit_the_manifest: "manifest.json is damaged: it does not match its own checksum",
    _point_outside: "manifest.json is damaged: files",
    _copy_another_step: "it holds step 1",
}


@pytest.mark.parametrize(
    ("damage", "fault"), DAMAGES.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_damaged_newest_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], fault: str
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path).step == 1
    assert f"step-00000002: {fault}" in caplog.text


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    _flip_a_bit(save(tmp_path, 1))
    _lose_the_manifest(save(tmp_path, 2))
    with pytest.raises(UserError) as caught:
        find_checkpoint(tmp_path, None)
    message = str(caught.value)
    assert f"step-00000001: {SHARD} does not match its checksum" in message
    assert "step-00000002: manifest.json: No such file" in message
    assert "move the folder away" in message


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_planted_pickles_are_never_opened(tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(_Bomb(mark))
    root = tmp_path / "checkpoints"
    save(root, 1)
    folder = save(root, 2)
    for name in ("rank-00001.safetensors", "optimizer.pt", "manifest.pkl", ".metadata"):
        (folder / name).write_bytes(bomb)
    assert found(root).step == 2

    (folder / SHARD).write_bytes(bomb)
    assert found(root).step == 1
    (folder / "manifest.json").write_bytes(bomb)
    assert found(root).step == 1
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the bomb is a dud"
