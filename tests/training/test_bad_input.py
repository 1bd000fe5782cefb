"""What a user can get wrong: one message on rank 0, code 2 on every rank, and nothing lost."""

from __future__ import annotations

import errno
import os
import re
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.harness import Ranks
from tests.programs import (
    Outcome,
    call_program,
    launch,
    metrics,
    only_complaint,
    script,
    write_run,
)
from tests.tiny import write_corpus
from uoe_parallel.checkpoint import find_checkpoint

SECONDS = 30
"""In which every rank must have ended, also those that would wait for one that left alone."""
SEQUENCE = 16


def _complaint(ranks: Ranks, world_size: int, path: Path, *overrides: str) -> str:
    """Rank 0's message about a run that must not even begin."""
    arguments = ("--config", path, *overrides)
    outcomes = ranks(world_size).run(call_program, *arguments, timeout=SECONDS)
    assert not (path.parent / "run").exists()
    return only_complaint(outcomes)


def _token_beyond_vocabulary(folder: Path, window: int) -> Path:
    """The YAML of a run whose first step takes two windows, one of them with a token id 300."""
    path = write_run(folder, training={"global_batch_size": 2, "micro_batch_size": 1})
    tokens = np.full(2 * SEQUENCE + 1, 65)
    tokens[window * SEQUENCE + SEQUENCE // 2] = 300
    builder = IndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.uint16)
    builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(str(folder / "train.idx"))
    return path


def test_layout_that_does_not_divide_the_world(ranks: Ranks, tmp_path: Path) -> None:
    message = _complaint(ranks, 3, write_run(tmp_path, parallel={"tensor": 2}))
    for word in ("parallel.tensor = 2", "world size of 3", "multiple of 2"):
        assert word in message


def test_batch_that_the_data_ranks_do_not_divide(ranks: Ranks, tmp_path: Path) -> None:
    message = _complaint(ranks, 3, write_run(tmp_path))
    for word in ("training.global_batch_size = 4", "2 x 3", "multiple of 6"):
        assert word in message


def test_heads_and_experts_that_ranks_do_not_divide_are_told_together(
    ranks: Ranks, tmp_path: Path
) -> None:
    wrong = ("model.num_kv_heads=1", "feed_forward.num_experts=1", "feed_forward.top_k=1")
    attention = "attention.routed_layers=none"
    path = write_run(tmp_path, parallel={"tensor": 2})
    message = _complaint(ranks, 2, path, *wrong, attention)
    for word in (
        *("has 3 faults", "model.num_kv_heads = 1", "feed_forward.num_experts = 1"),
        *("parallel.tensor = 2", "the nearest that is: parallel.tensor=1"),
    ):
        assert word in message


def test_missing_config(ranks: Ranks, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.yaml"
    assert str(missing) in _complaint(ranks, 2, missing)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_missing_data(ranks: Ranks, tmp_path: Path, split: str) -> None:
    path = write_run(tmp_path)
    (tmp_path / f"{split}.idx").unlink()
    message = _complaint(ranks, 2, path)
    for word in (str(tmp_path / f"{split}.idx"), "no such file", "build the corpus"):
        assert word in message


@pytest.mark.parametrize("lacking", [0, 1])
def test_data_that_one_node_lacks(ranks: Ranks, tmp_path: Path, lacking: int) -> None:
    path = write_run(tmp_path, data={"train": "train", "validation": None, "test": None})
    nodes = [tmp_path, tmp_path]
    nodes[lacking] = tmp_path / "bare"
    nodes[lacking].mkdir()
    arguments = ("--config", path)
    outcomes = ranks(2).run(call_program, *arguments, folders=nodes, timeout=SECONDS)

    message = only_complaint(outcomes)
    assert "train.idx" in message and "no such file" in message
    assert not (tmp_path / "run").exists()


def test_empty_corpus(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    write_corpus(tmp_path / "train", 0)
    message = _complaint(ranks, 2, path)
    for word in (str(tmp_path / "train.bin"), "empty", f"{SEQUENCE + 1} tokens"):
        assert word in message


def test_damaged_corpus(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    data = tmp_path / "train.bin"
    data.write_bytes(data.read_bytes()[:-2])
    message = _complaint(ranks, 2, path)
    assert str(data) in message and "build the corpus again" in message


@pytest.mark.parametrize("window", [0, 1])
def test_token_beyond_the_vocabulary_on_one_data_rank(
    ranks: Ranks, tmp_path: Path, window: int
) -> None:
    """The two windows fall to two data ranks, so that each of them is once the one that sees it."""
    path = _token_beyond_vocabulary(tmp_path, window)
    outcomes = ranks(2).run(call_program, "--config", path, timeout=SECONDS)

    message = only_complaint(outcomes)
    for word in (str(tmp_path / "train"), "token id 300", "257", "data.tokenizer"):
        assert word in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_token_beyond_the_vocabulary_in_validation_data(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"steps": 1})
    write_corpus(tmp_path / "validation", 400, vocab_size=5000)
    outcomes = ranks(2).run(call_program, "--config", path, timeout=SECONDS)
    message = only_complaint(outcomes)
    assert str(tmp_path / "validation") in message and "token id" in message


def test_run_folder_that_is_a_file(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (tmp_path / "run").write_text("precious")
    message = only_complaint(ranks(2).run(call_program, "--config", path, timeout=SECONDS))
    assert str(tmp_path / "run") in message and "run_dir" in message
    assert (tmp_path / "run").read_text() == "precious"


def _call_program_where(rank: int, owner: str, method: str, *arguments: str | Path) -> Outcome:
    """Call the program, with a method of the disk's failing on one rank."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "the-broken-disk")

    broken = f"uoe_parallel.{owner}.{method}" if int(os.environ["RANK"]) == rank else None
    with mock.patch(broken, fail) if broken else nullcontext():
        return call_program(*arguments)


@pytest.mark.parametrize(
    ("rank", "owner", "method"),
    [
        (0, "training.metrics.MetricsWriter", "write"),
        (1, "checkpoint.reader.CheckpointReader", "read"),
    ],
)
def test_disk_that_fails_one_rank_ends_all(
    ranks: Ranks, tmp_path: Path, rank: int, owner: str, method: str
) -> None:
    path = write_run(tmp_path, parallel={"tensor": 2}, training={"steps": 1})
    for outcome in ranks(2).run(call_program, "--config", path):
        assert outcome.code == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    arguments = (rank, owner, method, "--config", path, "training.steps=2")
    message = only_complaint(ranks(2).run(_call_program_where, *arguments, timeout=SECONDS))
    assert "the-broken-disk" in message and str(tmp_path / "run") in message
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-00000001"]


@pytest.mark.slow
def test_loss_that_is_not_a_number_leaves_the_last_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    nothing_else = {"validation": None, "test": None}
    path = write_run(tmp_path, parallel={"tensor": 2}, data=nothing_else)
    checkpoints = tmp_path / "run" / "checkpoints"

    def run(*overrides: str) -> list[Outcome]:
        return ranks(2).run(call_program, "--config", path, *overrides, timeout=SECONDS)

    assert [outcome.code for outcome in run("training.steps=2")] == [0, 0]
    message = only_complaint(run("training.steps=6", "training.learning_rate=1e25"))
    for word in ("loss of step", "nan", "training.learning_rate", "1e+25"):
        assert word in message
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    first, _ = run("training.steps=4")
    assert first.code == 0 and f"resuming from {checkpoints / 'step-00000002'}" in first.out
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_gradients_that_overflow_reach_no_checkpoint(
    ranks: Ranks, tmp_path: Path, zero_stage: int
) -> None:
    """At this rate weights grow until gradients overflow, a step before the loss is not finite."""
    path = write_run(
        tmp_path,
        parallel={"tensor": 2, "zero_stage": zero_stage},
        data={"validation": None, "test": None},
        training={"steps": 2, "learning_rate": 1e7},
        checkpoint={"every": 1, "keep": 1},
    )
    message = only_complaint(ranks(2).run(call_program, "--config", path, timeout=SECONDS))

    for word in ("gradient", "step 2", "training.learning_rate", "10000000.0"):
        assert word in message
    reader = find_checkpoint(tmp_path / "run" / "checkpoints", None)
    assert reader is not None and reader.step == 1
    keys = reader.keys()
    assert all(reader.read(key).isfinite().all() for key in keys)


@pytest.mark.slow
def test_torchrun_ends_with_one_message(tmp_path: Path) -> None:
    path = _token_beyond_vocabulary(tmp_path, 0)
    torchrun = [script("torchrun"), "--standalone", "--nproc-per-node", "2"]
    outcome = launch([*torchrun, "-m", "uoe_parallel.pretrain", "--config", path])

    assert outcome.code != 0
    assert outcome.err.count("uoe-pretrain: ") == 1, outcome.err
    assert outcome.err.count("token id 300") == 1
    assert re.search(r"exitcode\s*: 2\b", outcome.err)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["deepspeed.zero_optimization.nonsense=1"], ["deepspeed", "nonsense"]),
        (["deepspeed.amp={enabled: true}"], ["deepspeed.amp", "training.precision"]),
        (
            [
                "training.precision=bf16",
                "parallel.zero_stage=0",
                "deepspeed.data_types.grad_accum_dtype=fp32",
            ],
            ["deepspeed.data_types.grad_accum_dtype", "parallel.zero_stage"],
        ),
    ],
)
def test_deepspeed_section_that_cannot_be(
    ranks: Ranks, tmp_path: Path, overrides: list[str], named: list[str]
) -> None:
    path = write_run(tmp_path)
    message = only_complaint(ranks(1).run(call_program, "--config", path, *overrides))
    for word in named:
        assert word in message
