"""What is saved comes back, in any sharding; old checkpoints go, and damaged ones don't count."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint.examples import WEIGHT, found, names, save, weight
from uoe_parallel.checkpoint import (
    Piece,
    find_checkpoint,
    open_checkpoint,
    save_checkpoint,
    save_in_parts,
    store,
)
from uoe_parallel.checkpoint.manifest import DTYPES
from uoe_parallel.errors import UserError

Box = tuple[tuple[int, ...], tuple[int, ...]]


def _slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))


@st.composite
def _tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], Box]:
    """A shape, boxes that tile it, cut at random ever further, and one more box to read."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))
        if 0 < cut < sizes[dim]:
            moved = (*offsets[:dim], offsets[dim] + cut, *offsets[dim + 1 :])
            boxes.append((moved, (*sizes[:dim], sizes[dim] - cut, *sizes[dim + 1 :])))
            sizes = (*sizes[:dim], cut, *sizes[dim + 1 :])
        boxes.append((offsets, sizes))
    first = tuple(draw(st.integers(0, size)) for size in shape)
    room = zip(shape, first, strict=True)
    return shape, boxes, (first, tuple(draw(st.integers(0, s - f)) for s, f in room))


@given(case=_tilings(), dtype=st.sampled_from(["float32", "bfloat16", "float64", "uint8", "int64"]))
def test_any_box_of_any_sharding_reads_back(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Any, list[Box], Box], dtype: str
) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    shape, boxes, box = case
    whole = torch.randint(0, 100, shape).to(DTYPES[dtype])
    pieces = [Piece("w", whole[_slices(o, s)].contiguous(), shape, o) for o, s in boxes]
    save_checkpoint(root, 1, pieces, {}, None, keep=1)

    reader = find_checkpoint(root, None)
    assert reader is not None
    assert reader.dtype("w") == DTYPES[dtype]
    read = reader.read("w", *box)
    assert read.dtype == whole.dtype
    assert torch.equal(read, whole[_slices(*box)])
    assert torch.equal(reader.read("w"), whole)
    shutil.rmtree(root)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    # bool has two valid bytes only; all others take any.
    high = 2 if dtype == torch.bool else 256
    tensor = torch.randint(0, high, (16, 8), dtype=torch.uint8).view(dtype)
    save_checkpoint(tmp_path, 1, [Piece.whole("x", tensor)], {}, None, keep=1)
    reader = find_checkpoint(tmp_path, None)
    assert reader is not None
    assert torch.equal(reader.read("x").view(torch.uint8), tensor.view(torch.uint8))


def test_state_random_state_and_keys_come_back(tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    pieces = [Piece.whole("random.rank-0", random_state), Piece.whole("w@/exp_avg", weight(1))]
    state = {"step": 7, "config": {"lr": 1e-3}, "best": None, "seen": [2**63, "\N{SNOWMAN}"]}
    path = save_checkpoint(tmp_path / "deep" / "er", 7, pieces, state, None, keep=1)

    reader = find_checkpoint(tmp_path / "deep" / "er", None)
    assert reader is not None
    assert (reader.path, reader.step, reader.state) == (path, 7, state)
    assert sorted(reader.keys()) == ["random.rank-0", "w@/exp_avg"]
    torch.set_rng_state(reader.read("random.rank-0"))
    assert path.name == "step-00000007"


def test_entries_may_be_one_tensor(tmp_path: Path) -> None:
    one = weight(1)
    pieces = [Piece.whole("weight", one), Piece.whole("master", one)]
    save_checkpoint(tmp_path, 1, pieces, {}, None, keep=1)
    reader = find_checkpoint(tmp_path, None)
    assert reader is not None
    assert torch.equal(reader.read("master"), reader.read("weight"))


def test_what_was_read_outlives_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    reader = found(tmp_path)
    read = reader.read(WEIGHT, (0, 0), (2, 6))
    for file in path.iterdir():
        os.truncate(file, 0)
    assert torch.equal(read, weight(1)[:2])


def test_nothing_to_find(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing", None) is None
    (tmp_path / "step-00000001.partial").mkdir()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert find_checkpoint(tmp_path, None) is None


def test_newest_few_stay(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for step in (1, 2, 30, 100_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["notes", "step-00000030", "step-100000000"]
    assert found(tmp_path).step == 100_000_000


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000002" / "rank-00000.safetensors", 10)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    save(tmp_path, 4, keep=2)
    assert "step-00000001" in names(tmp_path)
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_run_that_fell_back_replaces_what_it_reaches_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    shard = tmp_path / "step-00000003" / "rank-00000.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]
    assert found(tmp_path).step == 3


def test_step_saved_again_leaves_no_trace_of_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    # As if power had failed between putting the second in place and removing the first.
    shutil.copytree(folder, folder.with_name("step-00000002.replaced"))
    save(tmp_path, 2, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert found(tmp_path).step == 2


def test_all_stay_on_request_and_each_can_be_opened(tmp_path: Path) -> None:
    for step in (1, 2, 30, 2):
        save(tmp_path, step, keep=None)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000030"]
    for step in (2, 30, 1):
        reader = open_checkpoint(tmp_path, step, None)
        assert reader.step == step
        assert torch.equal(reader.read(WEIGHT), weight(step))


def test_opening_a_step_takes_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for root in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError) as caught:
            open_checkpoint(root, 2, None)
        assert str(caught.value) == f"{root / 'step-00000002'} is not there"
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000002" / "rank-00000.safetensors", 10)
    with pytest.raises(UserError, match=r"step-00000002 is not whole .*has 10 bytes instead of"):
        open_checkpoint(tmp_path, 2, None)
    assert caplog.text == ""


def test_opening_a_step_finds_it_while_it_was_being_replaced(tmp_path: Path) -> None:
    """As if power had failed between putting the first aside and the second in place."""
    folder = save(tmp_path, 1)
    folder.replace(folder.with_name("step-00000001.replaced"))
    assert torch.equal(open_checkpoint(tmp_path, 1, None).read(WEIGHT), weight(1))


def test_leftovers_are_removed_and_strangers_are_not(tmp_path: Path) -> None:
    leftover = tmp_path / "step-00000009.partial"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "mine.partial").mkdir()
    save(tmp_path, 1)
    assert names(tmp_path) == ["mine.partial", "step-00000001"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_failing_disk_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code), "rank-00000.safetensors")

    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(UserError) as caught:
        save(tmp_path, 2)
    for part in ("step 2", str(tmp_path), "rank 0", os.strerror(code), "Earlier", "resume"):
        assert part in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    assert found(tmp_path).step == 1


def test_root_that_is_no_folder_is_a_user_error(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(UserError, match="could not be saved"):
        save(root, 1)
    with pytest.raises(UserError, match="can't look for checkpoints"):
        find_checkpoint(root, None)


def test_old_checkpoint_that_stays_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)

    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 2, keep=1)
    assert "step-00000001" in caplog.text
    assert found(tmp_path).step == 2


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece("w", torch.zeros(2), (4,), (0,))],
        [Piece("w", torch.zeros(4), (4,), (0,)), Piece("w", torch.zeros(1), (4,), (3,))],
        [Piece("w", torch.zeros(4), (4,), (0,)), Piece("w", torch.zeros(1), (5,), (4,))],
        [Piece("w", torch.zeros(2), (4,), (0,)), Piece("w", torch.zeros(2).int(), (4,), (2,))],
        [Piece.whole("w", torch.zeros(4)), Piece.whole("w", torch.zeros(4))],
        [Piece.whole("w", torch.zeros(4, 4).t())],
        [Piece.whole("w", torch.zeros(4, dtype=torch.complex64))],
    ],
    ids=["hole", "overlap", "two shapes", "two dtypes", "twice", "not contiguous", "complex"],
)
def test_pieces_that_make_no_whole_are_a_bug(tmp_path: Path, pieces: list[Piece]) -> None:
    save(tmp_path, 1)
    with pytest.raises(AssertionError):
        save_checkpoint(tmp_path, 2, pieces, {}, None, keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_box_outside_the_entry_is_a_bug(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for box in [((0, 0), (5, 6)), ((-1, 0), (1, 6)), ((0,), (4,))]:
        with pytest.raises(AssertionError, match=WEIGHT):
            found(tmp_path).read(WEIGHT, *box)


def test_parts_become_files_that_are_written_one_by_one(tmp_path: Path) -> None:
    def parts() -> Iterator[list[Piece]]:
        for number in range(3):
            assert len(list(tmp_path.rglob("*.safetensors"))) == number
            yield [Piece.whole(f"part {number}", torch.full((2,), float(number)))]

    saved = save_in_parts(tmp_path, 7, parts(), {"tokens": 1})
    reader = open_checkpoint(tmp_path, 7, None)
    assert (reader.path, reader.state) == (saved, {"tokens": 1})
    assert [reader.read(f"part {number}")[0] for number in range(3)] == [0, 1, 2]


def test_parts_that_cannot_be_made_leave_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[list[Piece]]:
        yield [Piece.whole("first", torch.zeros(2))]
        raise UserError("the second cannot be read")

    with pytest.raises(UserError, match="the second cannot be read"):
        save_in_parts(tmp_path, 0, parts(), {})
    assert names(tmp_path) == []
