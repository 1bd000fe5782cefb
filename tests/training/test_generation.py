from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.training.generation import sample

VOCAB_SIZE = 5


class Successor:
    """A model that nearly always continues i with i + 1, and remembers what it was shown: with
    each memory, and in each call."""

    def __init__(self, score: float = 100.0) -> None:
        self.score = score
        self.windows: list[list[int]] = []
        self.calls: list[list[int]] = []
        self._memory: object = None

    def __call__(self, ids_1S: Tensor, memory: DecodingMemory) -> Tensor:
        assert not torch.is_grad_enabled()
        assert ids_1S.dtype == torch.int64 and ids_1S.shape[0] == 1
        self.calls.append(ids_1S[0].tolist())
        if memory is not self._memory:
            self.windows.append([])
            self._memory = memory
        self.windows[-1] += self.calls[-1]
        next_1S = (ids_1S + 1) % VOCAB_SIZE
        return self.score * torch.nn.functional.one_hot(next_1S, VOCAB_SIZE).bfloat16()


def _sample(
    model: Successor,
    prompt: Sequence[int] = (0,),
    num_tokens: int = 200,
    context: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    by_token: bool = True,
) -> list[int]:
    return sample(
        model,
        prompt,
        by_token=by_token,
        num_tokens=num_tokens,
        context=context,
        temperature=temperature,
        seed=seed,
        device=torch.device("cpu"),
    )


def test_each_token_follows_from_the_last_one() -> None:
    assert _sample(Successor(), prompt=(3, 1), num_tokens=7) == [2, 3, 4, 0, 1, 2, 3]


def test_model_sees_the_prompt_and_then_one_token_at_a_time_of_at_most_the_context() -> None:
    model = Successor()
    _sample(model, prompt=(3, 1), num_tokens=7, context=4)
    # A full context goes on from its latter half.
    assert model.calls == [[3, 1], [2], [3], [3, 4], [0], [1], [1, 2]]
    assert model.windows == [[3, 1, 2, 3], [3, 4, 0, 1], [1, 2]]


def test_a_model_that_cannot_add_a_token_sees_whole_windows() -> None:
    model = Successor()
    _sample(model, prompt=(3, 1), num_tokens=4, context=4, by_token=False)
    assert model.windows == [[3, 1], [3, 1, 2], [3, 1, 2, 3], [1, 2, 3, 4]]


def test_a_context_of_one_token_works() -> None:
    model = Successor()
    assert _sample(model, prompt=(3,), num_tokens=3, context=1) == [4, 0, 1]
    assert model.windows == [[3], [4], [0]]


def test_prompt_longer_than_the_context_keeps_its_end() -> None:
    model = Successor()
    assert _sample(model, prompt=(4, 3, 2, 1, 0), num_tokens=1, context=3) == [1]
    assert model.windows == [[2, 1, 0]]


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


def test_nothing_follows_the_id_to_stop_at() -> None:
    arguments = {"num_tokens": 9, "context": 4, "temperature": 1.0, "seed": 0, "by_token": True}
    device = torch.device("cpu")
    assert sample(Successor(), (0,), stop=3, device=device, **arguments) == [1, 2, 3]  # pyright: ignore[reportArgumentType]
