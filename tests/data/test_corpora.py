"""Blends and splits as a config names them, for every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.tiny import tiny_config
from uoe_parallel.data.batches import MicroBatch, step_batches
from uoe_parallel.data.corpora import RunData, open_run_data
from uoe_parallel.data.draws import random_stream
from uoe_parallel.data.labelled import write_labelled_documents
from uoe_parallel.data.tokenizer import ByteTokenizer
from uoe_parallel.errors import UserError

LENGTH = 17
"""Tokens of a document: one window of the tiny model."""


def write(prefix: Path, first: int, documents: int) -> str:
    """Documents of one token each, `first` and those that follow."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number in range(documents):
        builder.add_item(torch.full((LENGTH,), first + number))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def open_with(model: dict[str, Any] | None = None, **data: Any) -> RunData:
    return open_run_data(tiny_config(data=data, model=model or {}), ByteTokenizer())


def tokens(batches: list[MicroBatch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


@pytest.fixture
def blend(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        {"prefix": write(tmp_path / "a", 0, 60), "weight": 3.0},
        {"prefix": write(tmp_path / "b", 100, 9), "weight": 1.0},
    ]


def test_a_blend_draws_by_weight_and_alike_for_every_data_parallel_size(
    blend: list[dict[str, Any]],
) -> None:
    data = open_with(train=blend)
    drawn = []
    for ranks, micro in ((1, 4), (4, 1), (2, 2)):
        by_rank = [
            step_batches(
                data.train,
                5,
                seed=7,
                global_batch_size=16,
                micro_batch_size=micro,
                data_rank=rank,
                data_size=ranks,
            )
            for rank in range(ranks)
        ]
        drawn.append(tokens([b for together in zip(*by_rank, strict=True) for b in together]))
    assert drawn[0] == drawn[1] == drawn[2]
    assert sum(row[0] >= 100 for row in drawn[0]) == 4
    assert data.sources == {"train": " or ".join(part["prefix"] for part in blend)}


@pytest.mark.parametrize("task", ["next_token", "masked_token"])
def test_rows_of_a_blend_are_those_of_its_corpora(blend: list[dict[str, Any]], task: str) -> None:
    config: dict[str, Any] = {"model": {"task": task}, "reset_at_documents": True}
    whole = open_with(train=blend, **config).train
    parts = [open_with(train=part["prefix"], **config).train for part in blend]
    numbers = [len(parts[0]) + 2, 5]
    streams = [random_stream(1), random_stream(2)]
    got = whole.micro_batch(numbers, streams, 3)
    assert got.documents is not None and got.documents[2].eq(-1).all()
    assert not got.loss_mask[2].any()
    streams = [random_stream(1), random_stream(2)]
    for row, (part, number) in enumerate(((1, 2), (0, 5))):
        alone = parts[part].micro_batch([number], [streams[row]], 1)
        for name, value in vars(alone).items():
            assert torch.equal(getattr(got, name)[row : row + 1], value), name


def test_labelled_documents_blend_too(tmp_path: Path) -> None:
    for name, label in (("a", 0), ("b", 1)):
        documents = [np.full(4, label, dtype=np.int64)] * 3
        write_labelled_documents(tmp_path / name, documents, [label] * 3)
    parts = [{"prefix": str(tmp_path / name), "weight": 1.0} for name in ("a", "b")]
    model = {"task": "classification", "num_classes": 2}
    batch = open_with(model, train=parts).train.micro_batch([0, 5], [random_stream(0)] * 2, 2)
    assert batch.labels.tolist() == [[0], [1]]
    assert batch.tokens[:, 0].tolist() == [0, 1]


def test_splits_cut_every_corpus_and_keep_its_weight(blend: list[dict[str, Any]]) -> None:
    data = open_with(train=blend, split=(4.0, 1.0, 1.0))
    assert list(data.evaluation) == ["validation", "test"]
    seen: list[set[int]] = []
    for examples in (data.train, *data.evaluation.values()):
        numbers = range(len(examples))
        batch = examples.micro_batch(numbers, [random_stream(0)] * len(numbers), len(numbers))
        seen.append(set(batch.tokens.flatten().tolist()))
    train, validation, test = seen
    assert (len(train & set(range(100))), len(validation), len(test)) == (40, 10 + 2, 10 + 1)
    assert not train & validation and not train & test and not validation & test
    assert train | validation | test == {*range(60), *range(100, 109)}
    draws = data.evaluation["test"].draws
    assert [draws.corpus_of(n)[0] for n in draws.spread(8).tolist()].count(1) == 2


def test_a_part_of_no_size_is_no_split(blend: list[dict[str, Any]]) -> None:
    data = open_with(train=blend[0]["prefix"], split=(1.0, 0.0, 1.0))
    assert list(data.evaluation) == ["test"]
    assert (len(data.train), len(data.evaluation["test"])) == (31, 31)


def test_a_weight_too_small_is_refused_by_name(blend: list[dict[str, Any]]) -> None:
    blend[1]["weight"] = 1e-5
    with pytest.raises(UserError, match=r"data\.validation: .*/b has weight 1e-05 of .*; raise it"):
        open_with(train=blend[0]["prefix"], validation=blend)


def test_fingerprints_tell_weights_and_corpora(blend: list[dict[str, Any]]) -> None:
    first = open_with(train=blend).train.fingerprint
    assert open_with(train=[{**p, "weight": 2 * p["weight"]} for p in blend]).train.fingerprint == (
        first
    )
    others = [
        [{**blend[0], "weight": 1.0}, blend[1]],
        blend[::-1],
        blend[:1],
    ]
    prints = [first, *(open_with(train=other).train.fingerprint for other in others)]
    assert len({str(fingerprint) for fingerprint in prints}) == 4
