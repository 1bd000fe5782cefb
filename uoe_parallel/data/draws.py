"""The order in which examples of one corpus, or of several by weight, are drawn.

Training draws from an endless sequence. Each corpus has epochs of its own in it, which are
permutations of its examples that depend on (seed, epoch, place of the corpus) alone; a fixed
pattern that repeats says whose turn it is. So the position in the sequence is all there is to save
about the order, whatever the layout, the length of the run or where it was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from megatron.core.datasets import (
    helpers_cpp,  # pyright: ignore[reportAttributeAccessIssue] (it is compiled)
)
from numpy.random import BitGenerator
from numpy.typing import NDArray

PATTERN = 2**16
"""Draws after which turns repeat: the shares of corpora are whole multiples of one in this."""


class _Turns(NamedTuple):
    """Whose turn each of some draws is, by Megatron's rule: that corpus which is furthest behind
    its share. Each gets a turn early on, however small its share."""

    corpora: NDArray[np.int16]
    """[draws]"""
    before: NDArray[np.int64]
    """How many of the draws before are of the same corpus, [draws]."""
    counts: NDArray[np.int64]
    """Of each corpus, how many draws it gets."""


class Draws:
    """Numbers of examples: those of the first corpus from 0 on, then those of the next.

    Of a corpus, the orders of the two latest epochs are kept, 8 bytes for each example in each,
    and twice as much again for the moment in which one is made. Nothing else grows.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float] = (1.0,)) -> None:
        """lengths: examples of each corpus, at least one. weights: above 0, of any sum."""
        assert len(lengths) == len(weights) and min(lengths) > 0 and min(weights) > 0
        self._lengths = np.array(lengths, dtype=np.int64)
        self._firsts = np.cumsum(self._lengths) - self._lengths
        self._shares = np.array(weights, dtype=np.float64) / np.sum(weights)
        self._turns = self._turns_of(PATTERN)
        self._orders: list[Callable[[int, int], NDArray[np.int64]]] = [
            lru_cache(maxsize=2)(partial(epoch_permutation, length, corpus=corpus))
            for corpus, length in enumerate(lengths)
        ]

    @property
    def shares(self) -> list[float]:
        """Of each corpus in the draws; their sum is 1."""
        return self._shares.tolist()

    @property
    def too_rare(self) -> list[int]:
        """Corpora whose share is less than one turn in the pattern, of which all get one."""
        return np.flatnonzero(self._shares * PATTERN < 1).tolist()

    def of_step(self, step: int, *, seed: int, global_batch_size: int) -> NDArray[np.int64]:
        """Numbers of the examples of optimizer step `step` (from 0): int64 [global_batch_size]."""
        positions = step * global_batch_size + np.arange(global_batch_size)
        rounds, places = np.divmod(positions, PATTERN)
        corpora = self._turns.corpora[places]
        # Of its own corpus, how many draws come before each.
        own = rounds * self._turns.counts[corpora] + self._turns.before[places]
        epochs, offsets = np.divmod(own, self._lengths[corpora])
        numbers = np.empty(global_batch_size, dtype=np.int64)
        for corpus, epoch in np.unique(np.stack((corpora, epochs)), axis=1).T.tolist():
            here = (corpora == corpus) & (epochs == epoch)
            numbers[here] = self._orders[corpus](seed, epoch)[offsets[here]]
        return numbers + self._firsts[corpora]

    def spread(self, count: int) -> NDArray[np.int64]:
        """`count` examples to evaluate on, or as many as there are: int64 [count].

        Corpora have their shares of them, and those of a corpus are spread evenly over it: the
        first windows of a text would be one document or two. Examples of a corpus that has fewer
        than its share are taken several times.
        """
        turns = self._turns_of(min(count, int(self._lengths.sum())))
        corpora = turns.corpora
        own = turns.before * self._lengths[corpora] // turns.counts[corpora]
        return own + self._firsts[corpora]

    def corpus_of(self, number: int) -> tuple[int, int]:
        """The corpus of an example, and the example's number in it."""
        corpus = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return corpus, number - int(self._firsts[corpus])

    def _turns_of(self, draws: int) -> _Turns:
        corpora, before = np.empty(draws, dtype=np.int16), np.empty(draws, dtype=np.int64)
        count = len(self._lengths)
        helpers_cpp.build_blending_indices(corpora, before, self._shares, count, draws, False)
        return _Turns(corpora, before, np.bincount(corpora, minlength=count))


def epoch_permutation(
    num_samples: int, seed: int, epoch: int, corpus: int = 0
) -> NDArray[np.int64]:
    """The order of epoch `epoch` (from 0): int64 [num_samples], read-only, each number once.

    Sorting raw random words instead of shuffling: numpy promises that a bit generator's stream
    stays the same between its versions, but not what its shuffles make of it.
    """
    # Places of two numbers are those of a step's rows. The first corpus is drawn as if alone.
    place = (epoch,) if corpus == 0 else (epoch, corpus, 0)
    words = random_stream(seed, *place).random_raw(num_samples)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def random_stream(seed: int, *place: int) -> BitGenerator:
    """Random words that depend on the seed and the place they are for, and on nothing else."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=place))
