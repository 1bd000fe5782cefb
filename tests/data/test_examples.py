"""Micro-batches of windows: documents kept apart, and tokens masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.tiny import tiny_config, write_corpus
from uoe_parallel.data.batches import MicroBatch, evaluation_batches, step_batches
from uoe_parallel.data.draws import random_stream
from uoe_parallel.data.examples import MaskedTokens, NextTokens, open_examples
from uoe_parallel.data.tokenizer import ByteTokenizer

EOD, MASK = 256, 257


class Windows:
    """One window after the other of a text."""

    def __init__(self, text: list[int], sequence_length: int) -> None:
        self.text = np.array(text)
        self.sequence_length = sequence_length
        self.fingerprint: list[int] = []

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.sequence_length

    def __getitem__(self, number: int, /) -> NDArray[np.int64]:
        start = number * self.sequence_length
        return self.text[start : start + self.sequence_length + 1]


def random_windows(count: int = 40, length: int = 50) -> Windows:
    text = np.random.default_rng(0).integers(0, 256, count * length + 1)
    text[::17] = EOD
    return Windows(text.tolist(), length)


def masked(windows: Windows, probability: float = 0.15, *, separate: bool = False) -> MaskedTokens:
    return MaskedTokens(
        windows,
        tokenizer=ByteTokenizer(),
        mask_probability=probability,
        separate_documents=separate,
    )


def of(
    examples: NextTokens | MaskedTokens, numbers: list[int], size: int, seed: int = 0
) -> MicroBatch:
    streams = [random_stream(seed, number) for number in numbers]
    return examples.micro_batch(numbers, streams, size)


def test_documents_end_with_their_end_and_start_over_in_the_next_row() -> None:
    windows = Windows([1, 2, EOD, 3, EOD, EOD, 4, 5, 6, EOD, 7, 8], 5)
    batch = of(NextTokens(windows, eod=EOD, separate_documents=True), [0, 1], 3)
    assert batch.documents is not None and batch.documents.dtype == torch.int64
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [-1] * 5]
    assert batch.tokens.tolist()[:2] == [[1, 2, EOD, 3, EOD], [EOD, 4, 5, 6, EOD]]
    assert batch.labels.tolist()[:2] == [[2, EOD, 3, EOD, EOD], [4, 5, 6, EOD, 7]]
    # An end of document is predicted, and predicts nothing.
    assert batch.loss_mask.int().tolist() == [[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0] * 5]


def test_without_separation_the_row_is_one_document() -> None:
    windows = Windows([1, EOD, 2, 3], 3)
    batch = of(NextTokens(windows, eod=EOD, separate_documents=False), [0], 1)
    assert batch.documents is None and batch.loss_mask.all()
    assert of(masked(windows), [0], 1).documents is None


def test_masked_documents_are_those_of_the_text() -> None:
    windows = random_windows()
    text = of(NextTokens(windows, eod=EOD, separate_documents=True), [0, 1], 3)
    hidden = of(masked(windows, separate=True), [0, 1], 3)
    assert text.documents is not None and hidden.documents is not None
    assert torch.equal(hidden.documents, text.documents)


def test_masking_is_berts_recipe() -> None:
    windows = random_windows(count=400)
    batch = of(masked(windows), list(range(400)), 401)
    text, shown, chosen = batch.labels, batch.tokens, batch.loss_mask
    assert torch.equal(
        text[:400],
        of(NextTokens(windows, eod=EOD, separate_documents=False), list(range(400)), 400).tokens,
    )
    assert torch.equal(shown[~chosen], text[~chosen])
    assert not chosen[text == EOD].any() and not chosen[400].any()
    real = (text != EOD)[:400].sum()
    # 18 000 tokens: within four standard deviations.
    assert chosen.sum() / real == pytest.approx(0.15, abs=0.011)
    replaced, originals = shown[chosen], text[chosen]
    is_mask, is_same = replaced == MASK, replaced == originals
    assert is_mask.double().mean() == pytest.approx(0.8, abs=0.032)
    assert is_same.double().mean() == pytest.approx(0.1, abs=0.025)
    others = replaced[~is_mask & ~is_same]
    assert others.max() < EOD and len(others.unique()) > 100, "any byte, and nothing else"


def test_chance_and_seed_change_the_masks() -> None:
    windows = random_windows()
    few, many = (of(masked(windows, p), [0, 1], 2).loss_mask for p in (0.1, 0.9))
    assert few.sum() < many.sum() / 4
    assert (few <= many).all(), "the same numbers are drawn"
    assert not torch.equal(of(masked(windows, 0.9), [0, 1], 2, seed=1).loss_mask, many)


def test_a_micro_batch_may_have_nothing_to_predict() -> None:
    batch = of(masked(random_windows(), 1e-12), [0, 1], 2)
    assert not batch.loss_mask.any() and torch.equal(batch.tokens, batch.labels)


def _step(micro: int, data_size: int, step: int) -> list[MicroBatch]:
    """All micro-batches of a step, in the order of the global batch."""
    ranks = [
        step_batches(
            masked(random_windows(), separate=True),
            step,
            seed=5,
            global_batch_size=12,
            micro_batch_size=micro,
            data_rank=rank,
            data_size=data_size,
        )
        for rank in range(data_size)
    ]
    return [batch for together in zip(*ranks, strict=True) for batch in together]


def _evaluation(micro: int, data_size: int, step: int) -> list[MicroBatch]:
    ranks = [
        evaluation_batches(
            masked(random_windows(), separate=True),
            12,
            micro_batch_size=micro,
            data_rank=rank,
            data_size=data_size,
        )
        for rank in range(data_size)
    ]
    return [batch for together in zip(*ranks, strict=True) for batch in together]


def _together(batches: list[MicroBatch]) -> torch.Tensor:
    parts = [(b.tokens, b.labels, b.loss_mask, b.documents) for b in batches]
    return torch.cat([torch.stack([t for t in p if t is not None]) for p in parts], dim=1)


@pytest.mark.parametrize("batches", [_step, _evaluation])
def test_masks_are_the_same_under_every_layout(
    batches: Callable[[int, int, int], list[MicroBatch]],
) -> None:
    expected = _together(batches(12, 1, 3))
    assert expected.shape == (4, 12, 50)
    for micro, data_size in ((1, 1), (1, 4), (2, 3), (4, 3)):
        assert torch.equal(_together(batches(micro, data_size, 3)), expected)


def test_masks_differ_between_steps_and_rows() -> None:
    windows = Windows([65] * 51, 50)  # the same text in every row of every step
    one, two = (
        step_batches(
            masked(windows),
            step,
            seed=5,
            global_batch_size=3,
            micro_batch_size=3,
            data_rank=0,
            data_size=1,
        )[0].loss_mask
        for step in (0, 1)
    )
    assert len({tuple(row.tolist()) for row in (*one, *two)}) == 6


def test_each_task_opens_its_own_examples(tmp_path: Path) -> None:
    prefix = str(write_corpus(tmp_path / "text", 100))
    tokenizer = ByteTokenizer()
    windows = open_examples(prefix, tiny_config(data={"reset_at_documents": True}), tokenizer)
    assert windows.micro_batch([0], [random_stream(0)], 1).documents is not None
    config = tiny_config(model={"task": "masked_token"}, data={"mask_probability": 0.999})
    hidden = open_examples(prefix, config, tokenizer).micro_batch([0], [random_stream(0)], 1)
    assert hidden.documents is None and (hidden.tokens == MASK).sum() > 8
    assert windows.fingerprint == open_examples(prefix, config, tokenizer).fingerprint
