from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness import Ranks
from tests.inference.cases import open_tiny
from tests.tiny import USED_VOCAB_SIZE
from uoe_parallel.inference.scoring import Window, score, sliding_windows

LENGTHS = [17, 9, 5, 12, 2]
MORE = ("tensor", "pipeline")
"""Layouts that fast tests of the program have too."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2}},
    "data": {},
    "pipeline": {"parallel": {"pipeline": 2}},
    "wide experts": {"parallel": {"expert": 2}},
}


@pytest.mark.parametrize("count", [2, 5, 6, 9, 23, 24])
@pytest.mark.parametrize("stride", [1, 3, 5])
@pytest.mark.parametrize("first", [1, 4])
def test_each_id_is_scored_once_with_the_context_that_the_stride_leaves(
    count: int, stride: int, first: int
) -> None:
    window, ids = 5, np.arange(count)
    windows = list(sliding_windows(ids, first, window=window, stride=stride))
    scored = Counter(int(i) for w in windows for i in w.ids[len(w.ids) - w.scored :])
    assert scored == Counter(range(first, count))
    for w in windows:
        np.testing.assert_array_equal(np.diff(w.ids), 1)  # no gap
        read = len(w.ids) - 1
        assert read == min(window, w.ids[-1])  # as much as there is, and may be
        assert w.scored <= stride or w.ids[0] == 0


def _windows() -> list[Window]:
    generator = np.random.default_rng(2)
    return [
        Window(generator.integers(0, USED_VOCAB_SIZE, length), 1 + length // 3)
        for length in LENGTHS
    ]


def _score(sections: dict[str, Any], batch_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    counts: list[int] = []
    scores = score(open_tiny(**sections), _windows(), batch_size=batch_size, advance=counts.append)
    return scores.nats_W, scores.greedy_W, sum(counts)


def _reference() -> tuple[torch.Tensor, torch.Tensor]:
    """By the logits of one window after the other."""
    opened = open_tiny()
    nats, greedy = [], []
    for window in _windows():
        ids = torch.from_numpy(window.ids)
        with torch.no_grad():
            logits = opened.logits(ids[:-1].unsqueeze(0))[0, -window.scored :]
        labels = ids[-window.scored :]
        nats.append(-logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).sum())
        greedy.append((logits.argmax(-1) == labels).all())
    return torch.stack(nats), torch.stack(greedy)


def test_scores_are_those_of_each_window_alone(ranks: Ranks) -> None:
    [(nats, greedy)] = ranks(1).run(_reference)
    [(got_nats, got_greedy, advanced)] = ranks(1).run(_score, {}, 3)
    torch.testing.assert_close(got_nats, nats, rtol=0, atol=1e-9)
    assert torch.equal(got_greedy, greedy)
    assert advanced == len(LENGTHS)


@pytest.mark.parametrize(
    "layout",
    ["data", "wide experts", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)],
)
def test_no_layout_shows(ranks: Ranks, layout: str) -> None:
    [(expected, _, _)] = ranks(1).run(_score, {}, 2)
    for nats, _, advanced in ranks(2).run(_score, LAYOUTS[layout], 1):
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-9)
        assert advanced == len(LENGTHS)


def _follow_the_model() -> list[bool]:
    """Whether the model's own guesses count as greedy, and other ids do not."""
    opened = open_tiny()
    ids = np.array([5, 9, 2])
    with torch.no_grad():
        guess = int(opened.logits(torch.from_numpy(ids).unsqueeze(0))[0, -1].argmax())
    ends = (guess, (guess + 1) % USED_VOCAB_SIZE)
    windows = [Window(np.append(ids, end), 1) for end in ends]
    return score(opened, windows, batch_size=2).greedy_W.tolist()


def test_greedy_are_the_ids_that_the_model_would_take(ranks: Ranks) -> None:
    assert ranks(1).run(_follow_the_model) == [[True, False]]


def _score_nothing() -> int:
    return len(score(open_tiny(), [], batch_size=2).nats_W)


def test_no_window_is_no_score(ranks: Ranks) -> None:
    assert ranks(2).run(_score_nothing) == [0, 0]
