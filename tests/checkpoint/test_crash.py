"""A save that is cut off anywhere leaves a whole checkpoint, and the next save tidies up."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.examples import found, names, save
from uoe_parallel.checkpoint import folders, store
from uoe_parallel.checkpoint.manifest import MANIFEST_NAME, unseal
from uoe_parallel.errors import UserError

# Everything through which a save touches the disk.
PRIMITIVES = [
    *((Path, "mkdir"), (Path, "replace"), (Path, "write_text")),
    *((os, "fsync"), (shutil, "rmtree"), (store, "save_file")),
]


class PowerCut(BaseException):
    """Ends a save like a killed process: nothing that runs on errors sees it."""


class _Fault:
    """Raises at the `number`-th use of any primitive: before, after or, if it can be, halfway."""

    def __init__(self, number: int, when: str, error: BaseException) -> None:
        self.left, self.when, self.error = number, when, error

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def primitive(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left != 0:
                return real(*args, **kwargs)
            if self.when == "halfway":
                _half(name, *args)
            if self.when == "after":
                real(*args, **kwargs)
            raise self.error

        return primitive


def _half(name: str, *args: Any) -> None:
    if name == "rmtree":
        min(args[0].iterdir()).unlink(missing_ok=True)
    if name == "write_text":
        args[0].write_bytes(args[1].encode()[: len(args[1]) // 2])
    if name == "save_file":
        args[1].write_bytes(b"half")


def _interrupted_saves(root: Path, step: int, when: str, error: BaseException) -> Any:
    """Save `step` over a checkpoint of step 1, failing at every primitive in turn."""
    for number in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        save(root, 1)
        fault = _Fault(number, when, error)
        outcome: BaseException | None = None
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in PRIMITIVES:
                patch.setattr(owner, name, fault.wrap(name, getattr(owner, name)))
            try:
                save(root, step, keep=1)
            except (PowerCut, UserError) as raised:
                outcome = raised
        if fault.left > 0:
            assert number > 10, "the save did not pass through the primitives"
            return
        yield outcome


def _is_whole(folder: Path) -> bool:
    manifest = unseal((folder / MANIFEST_NAME).read_bytes())
    return not any(record.fault(folder / name) for name, record in manifest.files.items())


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("when", ["before", "halfway", "after"])
def test_power_cut(tmp_path: Path, step: int, when: str) -> None:
    root = tmp_path / "checkpoints"
    for outcome in _interrupted_saves(root, step, when, PowerCut()):
        assert isinstance(outcome, PowerCut)
        assert found(root).step in {1, step}
        assert all(map(_is_whole, folders.list_checkpoints(root)))
        save(root, 3, keep=1)
        assert names(root) == ["step-00000003"]
        assert found(root).step == 3


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("when", ["before", "halfway", "after"])
def test_disk_error(tmp_path: Path, step: int, when: str) -> None:
    root = tmp_path / "checkpoints"
    refused = 0
    for outcome in _interrupted_saves(root, step, when, OSError(5, "Input/output error")):
        assert found(root).step in {1, step}
        if outcome is None:  # the new one is whole, only an old one would not go
            assert found(root).step == step
        else:
            refused += 1
            assert "Input/output error" in str(outcome)
            assert not any("partial" in name for name in names(root))
        save(root, 3, keep=1)
        assert names(root) == ["step-00000003"]
    assert refused > 8
