"""Which examples a step trains on, and this data rank's share of them.

Step t takes the t-th run of `global_batch_size` of the endless sequence that `draws.py` makes of
the examples, whatever the layout, the length of the run or where it was resumed, so that the step
number is all there is to save about the position in the data. What is drawn for an example, such
as the tokens to mask, comes from a stream that depends on (seed, step, row of the global batch)
alone.

Shape suffixes: b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.random import BitGenerator
from numpy.typing import NDArray

from uoe_parallel.config.schema import Task
from uoe_parallel.data.draws import Draws, random_stream

_EVALUATION_SEED = 0
"""Not the run's: runs that differ in their seed alone are evaluated alike."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads."""

    tokens: torch.Tensor
    """Inputs: int64 [b, s]."""
    labels: torch.Tensor
    """What to predict, int64: of each input the token that follows, or the token that was there
    before it was masked, [b, s]; or the class of each sequence, [b, 1]."""
    loss_mask: torch.Tensor
    """Whether the label counts in the loss: bool, of the labels' shape."""
    documents: torch.Tensor | None = None
    """int64 [b, s]: one id for all tokens of a document, another one for the next, -1 for padding;
    None if every sequence is one document."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        moved = (None if t is None else t.to(device) for t in vars(self).values())
        return MicroBatch(*moved)  # pyright: ignore[reportArgumentType]


class Examples(Protocol):
    """A fixed list of examples of a task."""

    @property
    def fingerprint(self) -> Sequence[object]:
        """Differs, as good as always, between lists that differ. Of JSON's types."""
        ...

    @property
    def draws(self) -> Draws:
        """In which order they are taken."""
        ...

    def __len__(self) -> int: ...

    def micro_batch(
        self, numbers: Sequence[int], streams: Sequence[BitGenerator], size: int
    ) -> MicroBatch:
        """The examples `numbers`, filled up to `size` rows with zeros that count nowhere.

        streams: for each example, where it draws random numbers from.
        """
        ...


def step_batches(
    examples: Examples,
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
    numbers = examples.draws.of_step(step, seed=seed, global_batch_size=global_batch_size)
    rows = batch_rows(
        global_batch_size,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
    )
    return [
        examples.micro_batch(
            numbers[share].tolist(),
            [random_stream(seed, step, row) for row in share.tolist()],
            micro_batch_size,
        )
        for share in rows
    ]


def batch_rows(
    global_batch_size: int, *, micro_batch_size: int, data_rank: int, data_size: int
) -> NDArray[np.int64]:
    """Which sequences of the global batch this data rank's micro-batches hold, in their order:
    int64 [micro-batches, micro_batch_size]. Over data ranks, each row is held once."""
    assert global_batch_size % (micro_batch_size * data_size) == 0
    rows = np.arange(global_batch_size).reshape(-1, data_size, micro_batch_size)
    return rows[:, data_rank]


def evaluation_batches(
    examples: Examples,
    num_sequences: int,
    *,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> Iterator[MicroBatch]:
    """This data rank's share of `num_sequences` examples, or of all if there are fewer.

    They are spread over the list as `Draws.spread` says.

    Every rank yields the same number of micro-batches of the same shape, so that all of them
    enter the same collectives; rows beyond the last example are padding.
    """
    numbers = examples.draws.spread(num_sequences).tolist()
    total = len(numbers)
    assert total > 0
    stride = micro_batch_size * data_size
    for start in range(0, total, stride):
        first = start + data_rank * micro_batch_size
        share = range(first, max(first, min(first + micro_batch_size, total)))
        batch = examples.micro_batch(
            numbers[share.start : share.stop],
            [random_stream(_EVALUATION_SEED, row) for row in share],
            micro_batch_size,
        )
        if start + stride > total and batch.documents is None:
            # On every rank alike, also on those without such rows.
            filler = torch.arange(micro_batch_size).unsqueeze(1) >= len(share)
            batch = replace(batch, documents=-filler.long().expand_as(batch.tokens))
        yield batch


def token_range(micro_batches: Iterable[MicroBatch], task: Task) -> tuple[int, int]:
    """The smallest and largest id that the data has, to be held against the tokenizer's."""
    # Masks are no ids of the data, and neither are classes.
    read = {
        "next_token": lambda batch: torch.cat((batch.tokens, batch.labels)),
        "masked_token": lambda batch: batch.labels,
        "classification": lambda batch: batch.tokens,
    }[task]
    ids = torch.cat([read(batch).flatten() for batch in micro_batches])
    return int(ids.min()), int(ids.max())
