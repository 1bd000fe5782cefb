"""Several ranks: each writes its share, all take the same path, also when one of them fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.examples import WEIGHT, found, names, save, weight
from tests.harness import Ranks
from uoe_parallel.checkpoint import Piece, find_checkpoint, save_checkpoint, store
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.agreement import broadcast_json, gather_json


def _world() -> tuple[int, dist.ProcessGroup]:
    group = dist.group.WORLD
    assert group is not None
    return group.rank(), group


def _save_columns(root: Path, step: int, absent: int | None = None) -> Any:
    """Ranks 0 and 1 save three columns each, further ranks have none; or the error of this rank."""
    rank, group = _world()
    pieces = []
    if rank < 2 and rank != absent:
        columns = weight(step)[:, 3 * rank : 3 * rank + 3].contiguous()
        pieces = [Piece(WEIGHT, columns, (4, 6), (0, 3 * rank))]
    # Rank 0's state is the one that counts.
    state = {"tokens": 10 * step if rank == 0 else -1}
    try:
        return save_checkpoint(root, step, pieces, state, group, keep=2)
    except (UserError, AssertionError) as error:
        return type(error).__name__, str(error)


def _save_with_full_disk(root: Path, step: int, full: list[int]) -> Any:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if _world()[0] in full:
            patch.setattr(store, "save_file", fail)
        return _save_columns(root, step)


def _find_rows(root: Path) -> Any:
    """What this rank finds, and its row; or its error."""
    rank, group = _world()
    try:
        reader = find_checkpoint(root, group)
    except UserError as error:
        return str(error)
    return reader and (reader.path, reader.state, reader.read(WEIGHT, (rank, 0), (1, 6)))


def _talk() -> tuple[list[Any], Any]:
    rank, group = _world()
    return gather_json({"rank": rank, "text": "\N{SNOWMAN}" * rank}, group), broadcast_json(
        [rank, "x" * 1000], group
    )


def test_messages_of_different_lengths(ranks: Ranks) -> None:
    gathered, heard = zip(*ranks(3).run(_talk), strict=True)
    assert gathered[0] == [{"rank": rank, "text": "\N{SNOWMAN}" * rank} for rank in range(3)]
    assert gathered[1:] == ([], [])
    assert heard == ([0, "x" * 1000],) * 3


def test_every_rank_writes_its_share_and_reads_any(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000005"
    assert ranks(3).run(_save_columns, tmp_path, 5) == [folder] * 3
    assert names(folder) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert found(tmp_path).step == 5
    for rank, (path, state, row) in enumerate(ranks(3).run(_find_rows, tmp_path)):
        assert (path, state) == (folder, {"tokens": 50})
        assert torch.equal(row, weight(5)[rank : rank + 1])


def test_ranks_agree_on_the_whole_one(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(_find_rows, tmp_path) == [None, None]
    older = save(tmp_path, 1)
    ranks(2).run(_save_columns, tmp_path, 2)
    # Only rank 1 reads this file.
    os.truncate(tmp_path / "step-00000002" / "rank-00001.safetensors", 5)
    assert [path for path, *_ in ranks(2).run(_find_rows, tmp_path)] == [older] * 2

    (older / "manifest.json").write_text("{}")
    first, second = ranks(2).run(_find_rows, tmp_path)
    assert first == second
    assert "step-00000002: rank-00001.safetensors has 5 bytes" in first
    assert "step-00000001: manifest.json is damaged" in first


@pytest.mark.parametrize("full", [[0], [1], [0, 1]])
def test_full_disk_of_one_rank_is_the_same_error_on_all(
    ranks: Ranks, tmp_path: Path, full: list[int]
) -> None:
    save(tmp_path, 1)
    first, second = ranks(2).run(_save_with_full_disk, tmp_path, 2, full)
    assert first == second
    assert first[0] == "UserError"
    assert f"rank {full[0]}: OSError: [Errno 28] No space left on device" in first[1]
    assert ("(and 1 other ranks)" in first[1]) == (len(full) == 2)
    assert names(tmp_path) == ["step-00000001"]
    assert found(tmp_path).step == 1


def test_missing_share_is_the_same_bug_on_all(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2).run(_save_columns, tmp_path, 1, absent=1)
    assert first == second
    assert first[0] == "AssertionError"
    assert "hole" in first[1]
    assert names(tmp_path) == []
