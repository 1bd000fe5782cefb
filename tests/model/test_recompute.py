"""Layers that are computed again in the backward pass change no bit and count nothing twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, full_gradients, random_tokens, start
from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.random import random_states

MODELS: dict[str, dict[str, Any]] = {
    "all routed": {},
    "some layers dense": {
        "feed_forward": {"routed_layers": [1]},
        "attention": {"routed_layers": [0]},
    },
}


def recompute_config(recompute: bool, dropout: float = 0.0, **sections: Any) -> RunConfig:
    return tiny_config(
        **{
            "model": {"dropout": dropout, "attention_dropout": dropout},
            "training": {"recompute_layers": recompute},
        }
        | sections
    )


def two_micro_batches(config: RunConfig) -> tuple[dict[str, Tensor], int]:
    """Everything that a step leaves behind, and the bytes that autograd kept of a forward pass."""
    groups = start(config)
    model = build_model(config, groups)
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    losses = []
    for seed in (3, 4):
        tokens = random_tokens(config, seed)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            losses.append(model(tokens, tokens.roll(-1, 1)))
        losses[-1].mean().backward()
    left = {f"losses {number}": loss.detach() for number, loss in enumerate(losses)}
    left |= full_gradients(model, groups)
    left |= {f"statistics {n}": b.statistics.pack() for n, b in model.routed_blocks().items()}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    return left | random_states(groups), activations


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, True), (2, False)])
def test_no_bit_changes_and_less_is_kept(
    ranks: Ranks, model: str, dropout: float, tensor: int, sequence_parallel: bool
) -> None:
    parallel = {"tensor": tensor, "sequence_parallel": sequence_parallel}
    sections = MODELS[model] | {"parallel": parallel}
    plain, recomputed = (
        ranks(tensor).run(two_micro_batches, recompute_config(recompute, dropout, **sections))
        for recompute in (False, True)
    )
    for (expected, all_bytes), (found, fewer_bytes) in zip(plain, recomputed, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
            assert not name.startswith("statistics") or (value[:-5].sum() > 0 and value[-1] > 0)
        assert fewer_bytes < all_bytes / 4


def without_gradients(config: RunConfig) -> tuple[Tensor, list[float]]:
    """Losses of an evaluation, and the tokens that each routed block counted."""
    model = build_model(config, start(config)).eval()
    tokens = random_tokens(config)
    with torch.no_grad():
        losses = model(tokens, tokens.roll(-1, 1))
    return losses, [b.statistics.pack().sum().item() for b in model.routed_blocks().values()]


def test_evaluation_is_as_it_was(ranks: Ranks) -> None:
    plain, recomputed = (
        ranks(1).run(without_gradients, recompute_config(recompute, 0.3))[0]
        for recompute in (False, True)
    )
    assert torch.equal(plain[0], recomputed[0])
    assert plain[1] == recomputed[1] == [0.0] * 4


def gradients_above_a_frozen_embedding(config: RunConfig) -> list[str]:
    """Parameters without a gradient when the layers' input asks for none."""
    model = build_model(config, start(config))
    tokens = random_tokens(config)
    assert model.embedding is not None
    model.embedding.requires_grad_(False)
    model(tokens, tokens.roll(-1, 1)).mean().backward()
    return [name for name, param in model.named_parameters() if param.grad is None]


def test_an_input_without_gradient_costs_no_parameter_its_own(ranks: Ranks) -> None:
    config = recompute_config(True)
    assert ranks(1).run(gradients_above_a_frozen_embedding, config)[0] == [
        "embedding.tokens.weight"
    ]
