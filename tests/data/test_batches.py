"""The order of samples: pure in (seed, step), the same under every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from uoe_parallel.data.batches import (
    MicroBatch,
    batch_rows,
    evaluation_batches,
    step_batches,
    token_range,
)
from uoe_parallel.data.draws import Draws, epoch_permutation, random_stream
from uoe_parallel.data.examples import NextTokens


class Windows:
    """Window i is i * 10, i * 10 + 1, ...: its first token names it."""

    sequence_length = 4

    def __init__(self, count: int) -> None:
        self.count = count
        self.fingerprint: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int, /) -> NDArray[np.int64]:
        assert 0 <= number < self.count
        return number * 10 + np.arange(self.sequence_length + 1)


def examples(count: int) -> NextTokens:
    return NextTokens(Windows(count), eod=-1, separate_documents=False)


def drawn(batches: list[MicroBatch]) -> list[int]:
    """Numbers of the windows in the rows that count."""
    rows = [row for b in batches for row in b.tokens[b.loss_mask.all(dim=1)]]
    return [int(row[0]) // 10 for row in rows]


@given(st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_has_every_sample_once(count: int, seed: int, epoch: int) -> None:
    order = epoch_permutation(count, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [epoch_permutation(50, seed, epoch).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_the_recorded_one() -> None:
    """A changed order would silently break the exact resume of runs made before the change."""
    assert epoch_permutation(8, 1234, 0).tolist() == [0, 2, 7, 6, 1, 4, 3, 5]
    assert Draws([8]).of_step(3, seed=1234, global_batch_size=3).tolist() == [2, 3, 4]


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 10))
def test_steps_walk_through_the_endless_sequence(count: int, size: int, seed: int) -> None:
    steps, draws = 4, Draws([count])
    walked = [draws.of_step(step, seed=seed, global_batch_size=size) for step in range(steps)]
    epochs = range(steps * size // count + 1)
    endless = np.concatenate([epoch_permutation(count, seed, epoch) for epoch in epochs])
    assert np.concatenate(walked).tolist() == endless[: steps * size].tolist()


@pytest.mark.parametrize(("micro", "data_size"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 3), (12, 1)])
def test_global_batch_is_the_same_under_every_layout(micro: int, data_size: int) -> None:
    dataset, size = examples(17), 12
    for step in (0, 1, 7):
        ranks = [
            step_batches(
                dataset,
                step,
                seed=5,
                global_batch_size=size,
                micro_batch_size=micro,
                data_rank=rank,
                data_size=data_size,
            )
            for rank in range(data_size)
        ]
        assert {len(batches) for batches in ranks} == {size // (micro * data_size)}
        in_order = [batch for together in zip(*ranks, strict=True) for batch in together]
        expected = dataset.draws.of_step(step, seed=5, global_batch_size=size)
        assert drawn(in_order) == expected.tolist()


@given(micro=st.integers(1, 4), data_size=st.integers(1, 4), count=st.integers(1, 4))
def test_rows_of_a_rank_name_its_sequences_of_the_global_batch(
    micro: int, data_size: int, count: int
) -> None:
    dataset, size, step = examples(100), micro * data_size * count, 3
    numbers = dataset.draws.of_step(step, seed=5, global_batch_size=size)
    held: list[int] = []
    for rank in range(data_size):
        rows = batch_rows(size, micro_batch_size=micro, data_rank=rank, data_size=data_size)
        assert rows.shape == (count, micro)
        batches = step_batches(
            dataset,
            step,
            seed=5,
            global_batch_size=size,
            micro_batch_size=micro,
            data_rank=rank,
            data_size=data_size,
        )
        for batch, row in zip(batches, rows, strict=True):
            assert drawn([batch]) == numbers[row].tolist()
        held += rows.flatten().tolist()
    assert sorted(held) == list(range(size))


def test_micro_batch_holds_inputs_and_the_tokens_that_follow() -> None:
    (batch,) = step_batches(
        examples(9),
        0,
        seed=0,
        global_batch_size=3,
        micro_batch_size=3,
        data_rank=0,
        data_size=1,
    )
    for field in (batch.tokens, batch.labels):
        assert field.shape == (3, 4)
        assert field.dtype == torch.int64
        assert field.is_contiguous()
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert batch.loss_mask.dtype == torch.bool
    assert batch.loss_mask.all()
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.tokens, moved.labels, moved.loss_mask)} == {"meta"}


@given(
    count=st.integers(1, 20),
    wanted=st.integers(1, 25),
    micro=st.integers(1, 4),
    data_size=st.integers(1, 4),
)
def test_evaluation_spreads_its_windows_and_gives_equal_shares(
    count: int, wanted: int, micro: int, data_size: int
) -> None:
    ranks = [
        list(
            evaluation_batches(
                examples(count),
                wanted,
                micro_batch_size=micro,
                data_rank=rank,
                data_size=data_size,
            )
        )
        for rank in range(data_size)
    ]
    total = min(wanted, count)
    assert {len(batches) for batches in ranks} == {-(-total // (micro * data_size))}
    in_order = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert drawn(in_order) == [i * count // total for i in range(total)]
    for batch in in_order:
        assert batch.tokens.shape == (micro, 4)
        padding = ~batch.loss_mask.any(dim=1)
        assert torch.equal(batch.loss_mask.all(dim=1), ~padding)
        assert not batch.tokens[padding].any()
        assert not batch.labels[padding].any()
    for together in zip(*ranks, strict=True):
        # Rows to fill up with are padding, and ranks agree on whether there is any.
        masks = [~batch.loss_mask.any(dim=1) for batch in together]
        for batch, padding in zip(together, masks, strict=True):
            if not any(mask.any() for mask in masks):
                assert batch.documents is None
            else:
                assert batch.documents is not None
                assert torch.equal(batch.documents, -padding.long().unsqueeze(1).expand(-1, 4))


def test_token_range_sees_what_the_data_has() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    low, high = torch.tensor([[1, 2]]), torch.tensor([[300, 3]])
    first = MicroBatch(low, low, mask)
    assert token_range([first, MicroBatch(low, high, mask)], "next_token")[1] == 300
    assert token_range([MicroBatch(high, low, mask)], "next_token")[1] == 300
    assert token_range([MicroBatch(high, -low, mask)], "next_token")[0] == -int(low.max())
    assert token_range([MicroBatch(high, low, mask)], "masked_token")[1] == 2, "masks are no ids"
    classes = MicroBatch(low, torch.tensor([[7]]), mask[:, :1])
    assert token_range([classes, first], "classification") == (1, 2)


def test_random_streams_depend_on_seed_and_place() -> None:
    places = [(1,), (1, 0), (1, 0, 0), (0, 1), (2, 1), (1, 2)]
    streams = [random_stream(seed, *place) for seed in (3, 4) for place in places]
    assert len({int(stream.random_raw()) for stream in streams}) == len(streams)
    # A change would silently break the exact resume of runs made before it.
    assert random_stream(1234, 5, 6).random_raw(2).tolist() == [
        2591507903533033623,
        4769220781882875824,
    ]
