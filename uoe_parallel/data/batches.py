"""Which sequences a step trains on, and this data rank's share of them.

Training draws from an endless sequence of epochs, each a permutation of the dataset that
depends on (seed, epoch) alone. Step t takes the t-th run of `global_batch_size` samples of that
sequence whatever the layout, the length of the run or where it was resumed, so that the step
number is all there is to save about the position in the data.

Shape suffixes: b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class WindowDataset(Protocol):
    """A fixed list of token windows."""

    @property
    def sequence_length(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> NDArray[np.int64]:
        """Window `number`: int64 [sequence_length + 1]."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads."""

    tokens: torch.Tensor
    """Inputs: int64 [b, s]."""
    labels: torch.Tensor
    """The token that follows each input: int64 [b, s]."""
    loss_mask: torch.Tensor
    """Whether the label counts in the loss: bool [b, s]."""
    documents: torch.Tensor | None = None
    """int64 [b, s]: one id for all tokens of a document, another one for the next, -1 for padding;
    None if every sequence is one document."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        moved = (None if t is None else t.to(device) for t in vars(self).values())
        return MicroBatch(*moved)  # pyright: ignore[reportArgumentType]


def step_batches(
    dataset: WindowDataset,
    step: int,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> list[MicroBatch]:
    """This data rank's micro-batches of optimizer step `step` (from 0).

    Sizes count sequences; `micro_batch_size` * `data_size` must divide `global_batch_size`. The
    union over data ranks is the same for every `data_size`, and micro-batch i of all ranks
    together is the same for every way to write the same product of the two.
    """
    numbers = sample_numbers(len(dataset), step, seed=seed, global_batch_size=global_batch_size)
    rows = batch_rows(
        global_batch_size,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
    )
    return [_micro_batch(dataset, share, micro_batch_size) for share in numbers[rows]]


def batch_rows(
    global_batch_size: int, *, micro_batch_size: int, data_rank: int, data_size: int
) -> NDArray[np.int64]:
    """Which sequences of the global batch this data rank's micro-batches hold, in their order:
    int64 [micro-batches, micro_batch_size]. Over data ranks, each row is held once."""
    assert global_batch_size % (micro_batch_size * data_size) == 0
    rows = np.arange(global_batch_size).reshape(-1, data_size, micro_batch_size)
    return rows[:, data_rank]


def evaluation_batches(
    dataset: WindowDataset,
    num_sequences: int,
    *,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> Iterator[MicroBatch]:
    """This data rank's share of `num_sequences` windows, or of all if there are fewer.

    The windows are spread evenly over the dataset: the first ones would be one document or two.

    Every rank yields the same number of micro-batches of the same shape, so that all of them
    enter the same collectives; rows beyond the last window are zeros that count nowhere.
    """
    total = min(num_sequences, len(dataset))
    assert total > 0
    stride = micro_batch_size * data_size
    for start in range(0, total, stride):
        first = start + data_rank * micro_batch_size
        share = np.arange(first, max(first, min(first + micro_batch_size, total)))
        yield _micro_batch(dataset, share * len(dataset) // total, micro_batch_size)


def token_range(micro_batches: Iterable[MicroBatch]) -> tuple[int, int]:
    """The smallest and largest id among inputs and labels, to be held against the vocabulary."""
    ids = torch.cat([torch.cat((b.tokens, b.labels)).flatten() for b in micro_batches])
    return int(ids.min()), int(ids.max())


def sample_numbers(
    num_samples: int, step: int, *, seed: int, global_batch_size: int
) -> NDArray[np.int64]:
    """Window numbers of the global batch of `step` (from 0): int64 [global_batch_size]."""
    positions = step * global_batch_size + np.arange(global_batch_size)
    epochs, offsets = np.divmod(positions, num_samples)
    numbers = np.empty(global_batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        numbers[here] = epoch_permutation(num_samples, seed, int(epoch))[offsets[here]]
    return numbers


@lru_cache(maxsize=2)
def epoch_permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of epoch `epoch` (from 0): int64 [num_samples], read-only, each number once.

    Sorting raw random words instead of shuffling: numpy promises that a bit generator's stream
    stays the same between its versions, but not what its shuffles make of it.
    """
    stream = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(stream.random_raw(num_samples), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def _micro_batch(
    dataset: WindowDataset, numbers: NDArray[np.int64], micro_batch_size: int
) -> MicroBatch:
    """The windows `numbers`, filled up to `micro_batch_size` rows with masked zeros."""
    windows = torch.zeros(micro_batch_size, dataset.sequence_length + 1, dtype=torch.int64)
    for row, number in enumerate(numbers):
        windows[row] = torch.from_numpy(dataset[int(number)])
    tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[: len(numbers)] = True
    return MicroBatch(tokens, labels, loss_mask)
