"""What a model makes of text that is there: the log-likelihood of tokens given those before.

Text is read in windows, of which each scores its last tokens and has the others before them as
context. Shape suffixes: W windows, b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uoe_parallel.inference.opening import OpenedModel
from uoe_parallel.model.relay import relay
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose


@dataclass(frozen=True)
class Window:
    """A piece of text that is read at once, as one document."""

    ids: NDArray[np.int64]
    """The model reads all but the last, and is asked for all but the first."""
    scored: int
    """How many of the last ids count."""


@dataclass(frozen=True)
class Scores:
    """Of some windows, the same on every rank."""

    nats_W: Tensor
    """fp64: minus the log-likelihood of the ids that count."""
    greedy_W: Tensor
    """bool: whether each of them is the one that the model finds likeliest."""


def sliding_windows(
    ids: NDArray[np.int64], first: int, *, window: int, stride: int
) -> Iterator[Window]:
    """Windows that score each of ids[first:] once.

    A model reads at most `window` ids, and after the first window scores at most `stride` of them,
    so that every id has window - stride + 1 before it to go by, or all there are. The last window
    is a full one.
    """
    assert first > 0 and 0 < stride <= window
    scored = first
    while scored < len(ids):
        end = min(len(ids), max(window + 1, scored + stride))
        yield Window(ids[max(0, end - window - 1) : end], end - scored)
        scored = end


@torch.no_grad()
def score(
    opened: OpenedModel,
    windows: Sequence[Window],
    *,
    batch_size: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Scores:
    """Every window once, shared out over data ranks. Collective over all ranks, which have the same
    windows.

    batch_size: windows of a micro-batch. advance: is told the number of windows that are done after
    each round of micro-batches, counted since the last time.
    """
    model, groups = opened.model, opened.groups
    totals_2W = torch.zeros(2, len(windows), dtype=torch.float64, device=opened.device)
    # Those of like length together: the rest of a micro-batch is padding.
    order = sorted(range(len(windows)), key=lambda number: -len(windows[number].ids))
    round_size = batch_size * groups.layout.data
    for start in range(0, len(order), round_size):
        numbers = order[start : start + round_size]
        length = len(windows[numbers[0]].ids) - 1
        length += -length % model.num_shards
        # As the ranks that share experts need it alike on all of them.
        is_full = len(numbers) == round_size and len(windows[numbers[-1]].ids) - 1 == length
        own = numbers[groups.data_rank * batch_size :][:batch_size]
        batch = _Batch.of([windows[n] for n in own], (batch_size, length), opened.device)
        logits = relay(model, batch.tokens_bs, None if is_full else batch.documents_bs)
        if logits is not None:
            losses_bs, correct_bs = model.judge(logits, batch.labels_bs)
            nats_b = losses_bs.double().masked_fill(~batch.counted_bs, 0).sum(1)
            wrong_b = (~correct_bs & batch.counted_bs).sum(1)
            totals_2W[:, own] = torch.stack((nats_b, wrong_b))[:, : len(own)].double()
        advance(len(numbers))
    # Of each window all ranks but those of one data rank's last stage have zeros.
    over = (groups.data, groups.pipe)
    nats_W, wrong_W = comm.sum_over(totals_2W, *over, purpose=Purpose.EVALUATION).cpu()
    return Scores(nats_W, wrong_W == 0)


@dataclass(frozen=True)
class _Batch:
    """Windows as the model reads them, filled up with padding behind."""

    tokens_bs: Tensor
    labels_bs: Tensor
    counted_bs: Tensor
    """bool."""
    documents_bs: Tensor
    """0, or -1 for padding."""

    @classmethod
    def of(
        cls, windows: Sequence[Window], shape_bs: tuple[int, int], device: torch.device
    ) -> _Batch:
        tokens, labels = np.zeros(shape_bs, np.int64), np.zeros(shape_bs, np.int64)
        counted, documents = np.zeros(shape_bs, np.bool_), np.full(shape_bs, -1)
        for row, window in enumerate(windows):
            read = len(window.ids) - 1
            tokens[row, :read], labels[row, :read] = window.ids[:-1], window.ids[1:]
            counted[row, read - window.scored : read] = True
            documents[row, :read] = 0
        return cls(*(torch.from_numpy(x).to(device) for x in (tokens, labels, counted, documents)))
