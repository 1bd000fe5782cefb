"""Routers that are fitted score experts by what they add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import start
from tests.tiny import tiny_config
from uoe_parallel.conversion.import_text import reorder_neurons
from uoe_parallel.conversion.routers import SCORE_SIZE, contributions, fit_router
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.backends import LoopBackend
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.model.language_model import LayerBuilder, TransformerBlock


def one_layer(**sections: dict[str, object]) -> tuple[TransformerBlock, Tensor]:
    """fp64, on one rank, with inputs [S, B, D] for its blocks."""
    config = tiny_config(**sections)
    builder = LayerBuilder(config, start(config), LoopBackend(), torch.float64)
    generator = torch.Generator().manual_seed(1)
    x_SBD = torch.randn(16, 40, 32, generator=generator, dtype=torch.float64)
    return TransformerBlock(builder, 0), x_SBD


def norms_by_leaving_out() -> list[tuple[Tensor, Tensor]]:
    """Of both blocks: `contributions`, and by how much each expert's absence changes the sum."""
    layer, x_SBD = one_layer()
    documents = Documents.whole(16, 40, x_SBD.device)
    pairs = []
    for experts in (layer.feed_forward.experts, layer.attention.experts):
        assert isinstance(experts, UnionOfMLPExperts | SelectiveMultiHeadAttention)
        with torch.no_grad():
            found_TE = contributions(experts, x_SBD)
            whole = experts(x_SBD, documents=documents)
            linear = experts.fc2 if isinstance(experts, UnionOfMLPExperts) else experts.output
            absent = []
            for expert in range(experts.num_experts):
                kept = linear.weight.clone()
                linear.slices(linear.weight)[expert] = 0
                change = whole - experts(x_SBD, documents=documents)
                absent.append(change.norm(dim=-1).flatten())
                linear.weight.copy_(kept)
        pairs.append((found_TE, torch.stack(absent, dim=1)))
    return pairs


def test_contributions_are_norms_of_what_is_missing_without_an_expert(ranks: Ranks) -> None:
    [pairs] = ranks(1).run(norms_by_leaving_out)
    for found_TE, expected_TE in pairs:
        torch.testing.assert_close(found_TE, expected_TE)


def fitted() -> tuple[Tensor, Tensor]:
    """Scores of the fitted router of a block whose experts answer to one direction each, and their
    contributions."""
    layer, x_SBD = one_layer(model={"activation": "gelu", "bias": False})
    experts = layer.feed_forward.experts
    assert isinstance(experts, UnionOfMLPExperts)
    with torch.no_grad():
        # An expert is active where its direction is positive, the more the further.
        experts.fc1.weight.zero_()
        for expert in range(8):
            experts.fc1.weight[expert * 8 : (expert + 1) * 8, expert] = 1.0
        weight_ED = fit_router(experts, [x_SBD[:, :20], x_SBD[:, 20:]])
        scores_TE = x_SBD.flatten(0, 1) @ weight_ED.t()
        return scores_TE, contributions(experts, x_SBD)


def test_the_expert_that_adds_most_is_scored_highest(ranks: Ranks) -> None:
    [(scores_TE, norms_TE)] = ranks(1).run(fitted)
    size = scores_TE.square().mean().sqrt()
    torch.testing.assert_close(size, torch.full_like(size, SCORE_SIZE), rtol=1e-6, atol=0)
    right = (scores_TE.argmax(1) == norms_TE.argmax(1)).double().mean()
    assert right > 0.8  # of eight
    kept = norms_TE.gather(1, scores_TE.topk(4).indices).sum() / norms_TE.sum()
    best = norms_TE.topk(4).values.sum() / norms_TE.sum()
    assert kept > 0.95 * best


def outputs_before_and_after(activation: str) -> tuple[Tensor, Tensor]:
    """Of a block whose neurons move five places down."""
    layer, x_SBD = one_layer(model={"activation": activation})
    experts = layer.feed_forward.experts
    assert isinstance(experts, UnionOfMLPExperts)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.uniform_(-1, 1)
        before, sixth_D = experts(x_SBD), experts.to_dense().up_FD[5].clone()
        reorder_neurons(experts, torch.arange(64).roll(-5))
        assert torch.equal(experts.to_dense().up_FD[0], sixth_D)
        return before, experts(x_SBD)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_neurons_change_places_and_nothing_else(ranks: Ranks, activation: str) -> None:
    [(before, after)] = ranks(1).run(outputs_before_and_after, activation)
    torch.testing.assert_close(before, after)
