"""Turns of corpora by weight: pure in (seed, position), each corpus in epochs of its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_parallel.data.draws import PATTERN, Draws, epoch_permutation

CORPORA = st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 20)), min_size=1, max_size=4)


def of(corpora: list[tuple[int, float]]) -> Draws:
    lengths, weights = zip(*corpora, strict=True)
    return Draws(lengths, weights)


@settings(max_examples=20)
@given(CORPORA, st.integers(1, 7), st.integers(0, 3))
def test_each_corpus_is_walked_through_in_epochs_of_its_own(
    corpora: list[tuple[int, float]], size: int, seed: int
) -> None:
    draws, steps = of(corpora), 300 // size
    batches = [draws.of_step(step, seed=seed, global_batch_size=size) for step in range(steps)]
    numbers = np.concatenate(batches)
    whole = draws.of_step(0, seed=seed, global_batch_size=steps * size)
    assert numbers.tolist() == whole.tolist(), "the cut into steps shows"
    places = [draws.corpus_of(number) for number in numbers.tolist()]
    total = sum(weight for _, weight in corpora)
    for corpus, (length, weight) in enumerate(corpora):
        own = [number for which, number in places if which == corpus]
        epochs = (epoch_permutation(length, seed, e, corpus) for e in range(len(own) // length + 1))
        assert own == np.concatenate(list(epochs))[: len(own)].tolist()
        assert abs(len(own) - len(numbers) * weight / total) < len(corpora)


def test_turns_go_on_from_one_pattern_to_the_next() -> None:
    draws = Draws([900, 700, 300], [5.0, 2.0, 1.0])
    size = 2**12
    steps = [draws.of_step(s, seed=1, global_batch_size=size) for s in range(3 * PATTERN // size)]
    numbers = np.concatenate(steps)
    edges = np.cumsum([0, 900, 700, 300])
    for corpus, length in enumerate((900, 700, 300)):
        own = numbers[(numbers >= edges[corpus]) & (numbers < edges[corpus + 1])] - edges[corpus]
        for epoch in (0, len(own) // length - 1):
            expected = epoch_permutation(length, 1, epoch, corpus).tolist()
            assert own[epoch * length : (epoch + 1) * length].tolist() == expected


def test_orders_are_the_recorded_ones() -> None:
    """A changed order would silently break the exact resume of runs made before the change."""
    draws = Draws([4, 6], [1.0, 2.0])
    assert draws.of_step(1, seed=1234, global_batch_size=9).tolist() == [3, 5, 9, 2, 7, 8, 3, 6, 4]


def test_the_first_corpus_is_drawn_as_if_alone_and_others_in_other_orders() -> None:
    alone = Draws([30]).of_step(0, seed=3, global_batch_size=30).tolist()
    both = Draws([30, 30], [1.0, 1.0]).of_step(0, seed=3, global_batch_size=60).tolist()
    assert [number for number in both if number < 30] == alone
    assert [number - 30 for number in both if number >= 30] != alone


def test_a_late_step_is_found_without_the_steps_before() -> None:
    draws = Draws([1000, 10], [0.99, 0.01])
    numbers = draws.of_step(10**12, seed=0, global_batch_size=64)
    assert numbers.tolist() == draws.of_step(10**12, seed=0, global_batch_size=64).tolist()
    assert (numbers >= 0).all() and (numbers < 1010).all()


@pytest.mark.parametrize(("weight", "rare"), [(0.5 / PATTERN, [1]), (2 / PATTERN, [])])
def test_weights_too_small_for_a_turn_are_told(weight: float, rare: list[int]) -> None:
    assert Draws([10, 10], [1.0, weight]).too_rare == rare


def test_evaluation_has_shares_spread_over_each_corpus() -> None:
    draws = Draws([100, 10, 3], [2.0, 1.0, 1.0])
    places = [draws.corpus_of(number) for number in draws.spread(16).tolist()]
    own = [[number for which, number in places if which == corpus] for corpus in range(3)]
    assert own == [[j * 100 // 8 for j in range(8)], [0, 2, 5, 7], [0, 0, 1, 2]]
    assert len(draws.spread(1000)) == 113
    assert Draws([7]).spread(100).tolist() == list(range(7))
