"""The same seed gives the same losses and gradients under every tensor layout (UoE 6.1, 6.5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import hidden_and_gradients, loss_and_gradients, relative_difference
from tests.tiny import GPT_2, tiny_config

OneRank = Callable[..., tuple[Tensor, dict[str, Tensor]]]

FP32_TOLERANCE = 2e-5
FP64_TOLERANCE = 1e-11

MODELS: dict[str, dict[str, Any]] = {
    "swiglu, grouped queries": {},
    "gelu, softmax gate, untied": {
        "model": {"activation": "gelu", "num_kv_heads": 8, "tie_embeddings": False},
        "feed_forward": {"gate": "softmax"},
        "attention": {"gate": "softmax", "top_k": 3},
    },
    "some layers dense, no bias": {
        "model": {"bias": False},
        "feed_forward": {"routed_layers": [1]},
        "attention": {"routed_layers": [0]},
    },
    "GPT-2's parts": {"model": GPT_2},
    "one expert a token": {"feed_forward": {"top_k": 1}, "attention": {"top_k": 1}},
    "all experts": {"feed_forward": {"top_k": 8}, "attention": {"top_k": 4}},
    "dense": {"feed_forward": {"routed_layers": "none"}, "attention": {"routed_layers": "none"}},
}
LAYOUTS = [(2, True), (2, False), (4, True), pytest.param(4, False, marks=pytest.mark.slow)]


def sections(model: str, tensor: int, sequence_parallel: bool) -> dict[str, Any]:
    return MODELS[model] | {"parallel": {"tensor": tensor, "sequence_parallel": sequence_parallel}}


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks) -> OneRank:
    """A case's result on one rank, computed once for all layouts."""

    @cache
    def run(case: Callable[..., Any], model: str) -> tuple[Tensor, dict[str, Tensor]]:
        return ranks(1).run(case, tiny_config(**MODELS[model]))[0]

    return run


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tensor", "sequence_parallel"), LAYOUTS)
def test_fp32_losses_and_gradients_are_those_of_one_rank(
    ranks: Ranks, one_rank: OneRank, model: str, tensor: int, sequence_parallel: bool
) -> None:
    expected = one_rank(loss_and_gradients, model)
    config = tiny_config(**sections(model, tensor, sequence_parallel))
    for losses, gradients in ranks(tensor).run(loss_and_gradients, config):
        torch.testing.assert_close(losses, expected[0], rtol=FP32_TOLERANCE, atol=1e-6)
        worst, name = relative_difference(gradients, expected[1], eps=1e-3)
        assert worst < FP32_TOLERANCE, name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tensor", "sequence_parallel"), LAYOUTS)
def test_fp64_hidden_states_and_gradients_are_those_of_one_rank(
    ranks: Ranks, one_rank: OneRank, model: str, tensor: int, sequence_parallel: bool
) -> None:
    expected = one_rank(hidden_and_gradients, model)
    config = tiny_config(**sections(model, tensor, sequence_parallel))
    for hidden, gradients in ranks(tensor).run(hidden_and_gradients, config):
        torch.testing.assert_close(hidden, expected[0], rtol=FP64_TOLERANCE, atol=1e-12)
        worst, name = relative_difference(gradients, expected[1], eps=1e-6)
        assert worst < FP64_TOLERANCE, name
