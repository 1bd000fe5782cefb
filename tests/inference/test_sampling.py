from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from uoe_parallel.inference.sampling import NextLogits, Sampling, sample
from uoe_parallel.model.decoding import DecodingMemory

VOCAB_SIZE = 5


class Successor:
    """A model that nearly always continues i with i + 1, and remembers what it was shown: with
    each memory, and in each call."""

    def __init__(self, score: float = 100.0) -> None:
        self.score = score
        self.windows: list[list[list[int]]] = []
        self.calls: list[list[list[int]]] = []
        self._memory: DecodingMemory | None = None

    def __call__(
        self, tokens_BS: Tensor, documents_BS: Tensor | None, memory: DecodingMemory
    ) -> Tensor:
        assert not torch.is_grad_enabled()
        assert tokens_BS.dtype == torch.int64
        if documents_BS is None:
            documents_BS = torch.zeros_like(tokens_BS)
        lengths = (documents_BS == 0).sum(1)
        rows = [ids[:length].tolist() for ids, length in zip(tokens_BS, lengths, strict=True)]
        self.calls.append(rows)
        if memory is not self._memory:
            assert memory.is_empty
            self.windows.append([[] for _ in rows])
            self._memory = memory
        else:
            assert all(len(row) == 1 for row in rows)
        memory.position_B = torch.zeros(len(rows))  # as of a model that filled it
        for window, row in zip(self.windows[-1], rows, strict=True):
            window += row
        next_B = torch.tensor([(row[-1] + 1) % VOCAB_SIZE for row in rows])
        return self.score * torch.nn.functional.one_hot(next_B, VOCAB_SIZE).bfloat16()

    @property
    def only_calls(self) -> list[list[int]]:
        return [call for [call] in self.calls]

    @property
    def only_windows(self) -> list[list[int]]:
        return [window for [window] in self.windows]


def _sample_all(
    model: NextLogits,
    prompts: Sequence[Sequence[int]],
    num_tokens: int = 200,
    context: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    by_token: bool = True,
    ends: Callable[[int, int], bool] = lambda number, token: False,
) -> list[list[int]]:
    return sample(
        model,
        prompts,
        sampling=Sampling(num_tokens, temperature, top_p),
        seeds=seeds or [0] * len(prompts),
        context=context,
        by_token=by_token,
        device=torch.device("cpu"),
        ends=ends,
    )


def _sample(
    model: NextLogits, prompt: Sequence[int] = (0,), seed: int = 0, **options: Any
) -> list[int]:
    [ids] = _sample_all(model, [prompt], seeds=[seed], **options)
    return ids


def test_each_token_follows_from_the_last_one() -> None:
    assert _sample(Successor(), prompt=(3, 1), num_tokens=7) == [2, 3, 4, 0, 1, 2, 3]


def test_model_sees_the_prompt_and_then_one_token_at_a_time_of_at_most_the_context() -> None:
    model = Successor()
    _sample(model, prompt=(3, 1), num_tokens=7, context=4)
    # A full context goes on from its latter half.
    assert model.only_calls == [[3, 1], [2], [3], [3, 4], [0], [1], [1, 2]]
    assert model.only_windows == [[3, 1, 2, 3], [3, 4, 0, 1], [1, 2]]


def test_a_model_that_cannot_add_a_token_sees_whole_windows() -> None:
    model = Successor()
    _sample(model, prompt=(3, 1), num_tokens=4, context=4, by_token=False)
    assert model.only_windows == [[3, 1], [3, 1, 2], [3, 1, 2, 3], [1, 2, 3, 4]]


def test_a_context_of_one_token_works() -> None:
    model = Successor()
    assert _sample(model, prompt=(3,), num_tokens=3, context=1) == [4, 0, 1]
    assert model.only_windows == [[3], [4], [0]]


def test_prompt_longer_than_the_context_keeps_its_end() -> None:
    model = Successor()
    assert _sample(model, prompt=(4, 3, 2, 1, 0), num_tokens=1, context=3) == [1]
    assert model.only_windows == [[2, 1, 0]]


def test_seed_alone_decides() -> None:
    flat = Successor(score=0.0)
    first = _sample(flat, seed=1)
    torch.rand(3)
    assert _sample(flat, seed=1) == first
    assert _sample(flat, seed=2) != first


def test_random_state_of_the_run_is_left_alone() -> None:
    state = torch.get_rng_state()
    _sample(Successor(score=0.0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability(temperature: float) -> None:
    score = 2.0
    count = 4000
    ids = [0, *_sample(Successor(score), num_tokens=count, temperature=temperature)]
    hits = sum(after == (before + 1) % VOCAB_SIZE for before, after in pairwise(ids))
    scores = torch.tensor([score, *[0.0] * (VOCAB_SIZE - 1)])
    expected = (scores / temperature).softmax(-1)[0].item()
    # Five standard deviations of a share of `count` draws.
    assert hits / count == pytest.approx(expected, abs=5 * 0.5 / count**0.5)


def test_nothing_follows_where_a_text_ends() -> None:
    heard: list[tuple[int, int]] = []

    def ends(number: int, token: int) -> bool:
        heard.append((number, token))
        return token == 3

    model = Successor()
    prompts = [(0,), (1, 2), (3, 4, 0)]
    assert _sample_all(model, prompts, num_tokens=9, ends=ends) == [[1, 2, 3], [3], [1, 2, 3]]
    assert [token for number, token in heard if number == 1] == [3]
    assert heard.count((0, 3)) == 1


def test_temperature_of_zero_takes_the_likeliest_and_of_equals_the_lowest() -> None:
    assert _sample(Successor(score=0.1), num_tokens=5, temperature=0) == [1, 2, 3, 4, 0]
    assert _sample(Successor(score=0.0), num_tokens=3, temperature=0) == [0, 0, 0]
    assert _sample(Successor(score=0.1), num_tokens=3, temperature=1e-40) == [1, 2, 3]


class Fixed:
    """A model that says the same of every next token."""

    def __init__(self, *probabilities: float) -> None:
        self.logits_V = torch.tensor(probabilities).log()

    def __call__(
        self, tokens_BS: Tensor, documents_BS: Tensor | None, memory: DecodingMemory
    ) -> Tensor:
        return self.logits_V.expand(len(tokens_BS), -1)


@pytest.mark.parametrize(
    ("top_p", "drawn"), [(1.0, {0, 1, 2, 3}), (0.9, {1, 2, 3}), (0.6, {1, 3}), (0.1, {3})]
)
def test_top_p_draws_among_as_few_as_have_that_probability(top_p: float, drawn: set[int]) -> None:
    model = Fixed(0.05, 0.25, 0.2, 0.5)
    ids = _sample(model, num_tokens=400, context=1000, top_p=top_p)
    assert set(ids) == drawn
    share = 0.5 / {1.0: 1.0, 0.9: 0.95, 0.6: 0.75, 0.1: 0.5}[top_p]
    assert ids.count(3) / len(ids) == pytest.approx(share, abs=5 * 0.5 / 400**0.5)


@pytest.mark.parametrize("by_token", [True, False])
def test_a_text_is_the_same_in_any_batch(by_token: bool) -> None:
    prompts = [(0,), (4, 3, 2), (1, 1, 1, 1, 1, 1), (2, 0)]
    seeds = [3, 4, 5, 3]
    options: dict[str, Any] = {"num_tokens": 30, "by_token": by_token}

    def ends(number: int, token: int) -> bool:
        return token == 4

    model = Successor(score=1.0)
    together = _sample_all(model, prompts, seeds=seeds, ends=ends, **options)
    alone = [
        _sample(Successor(score=1.0), prompt, seed, ends=ends, **options)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert together == alone
    assert len({len(ids) for ids in together}) > 1  # they end at different places


def test_texts_of_a_batch_begin_anew_where_each_of_them_would_alone() -> None:
    model = Successor()
    _sample_all(model, [(0, 1, 2), (4,)], num_tokens=4, context=4)
    # The first is full after its second token; the other stays as it is.
    assert model.calls == [
        [[0, 1, 2], [4]],
        [[3], [0]],
        [[3, 4], [4, 0, 1]],
        [[0], [2]],
    ]


def test_no_row_is_kept_beyond_the_context_after_its_text_has_ended() -> None:
    model = Successor()
    _sample_all(
        model,
        [(0, 1, 2), (3,)],
        num_tokens=6,
        context=4,
        ends=lambda number, token: number == 0,
    )
    assert max(len(row) for window in model.windows for row in window) <= 4
    assert [len(call) for call in model.calls] == [2, 2, 1, 1, 1, 1]
