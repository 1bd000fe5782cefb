"""What the backward pass computes again changes no bit, is not counted twice and is not kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, full_gradients, random_tokens, start
from tests.saved import Saved
from tests.tiny import tiny_config
from uoe_parallel.config.schema import Recompute, RunConfig
from uoe_parallel.experts.backends import GroupedBackend
from uoe_parallel.model.builder import LayerBuilder
from uoe_parallel.model.context import micro_batch_context
from uoe_parallel.parallel.random import random_states

MODELS: dict[str, dict[str, Any]] = {
    "all routed": {},
    "some layers dense": {
        "feed_forward": {"routed_layers": [1]},
        "attention": {"routed_layers": [0], "keys_and_values": "all"},
    },
}
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


def recompute_config(recompute: Recompute, dropout: float = 0.0, **sections: Any) -> RunConfig:
    return tiny_config(
        **{
            "model": {"dropout": dropout, "attention_dropout": dropout},
            "training": {"recompute": recompute},
        }
        | sections
    )


def two_micro_batches(config: RunConfig) -> tuple[dict[str, Tensor], int]:
    """Everything that a step leaves behind, and the bytes that are kept of a forward pass."""
    groups = start(config)
    model = build_model(config, groups)
    losses, kept = [], 0
    for seed in (3, 4):
        tokens = random_tokens(config, seed)
        saved = Saved()
        with saved:
            losses.append(model(tokens, tokens.roll(-1, 1)))
        kept = saved.bytes(losses[-1], beside=model.parameters())
        losses[-1].mean().backward()
    left = {f"losses {number}": loss.detach() for number, loss in enumerate(losses)}
    left |= full_gradients(model, groups)
    left |= {f"statistics {n}": b.statistics.pack() for n, b in model.routed_blocks().items()}
    return left | random_states(groups), kept


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, True), (2, False)])
def test_no_bit_changes_and_less_is_kept(
    ranks: Ranks, model: str, dropout: float, tensor: int, sequence_parallel: bool
) -> None:
    parallel = {"tensor": tensor, "sequence_parallel": sequence_parallel}
    sections = MODELS[model] | {"parallel": parallel}
    plain, selective, full = (
        ranks(tensor).run(two_micro_batches, recompute_config(recompute, dropout, **sections))
        for recompute in MODES
    )
    for (expected, most), (other, less), (another, least) in zip(
        plain, selective, full, strict=True
    ):
        for found in (other, another):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), name
                assert not name.startswith("statistics") or (value[:-5].sum() > 0 and value[-1] > 0)
        assert 0 < least < 0.4 * most
        assert least < less < 0.85 * most


def kept_of_block(config: RunConfig, kind: str) -> tuple[int, int]:
    """Bytes kept of a block's forward pass, and rows that came to its experts."""
    groups = start(config)
    block = getattr(LayerBuilder(config, groups, GroupedBackend(), torch.float32), kind)(0)
    rows: list[int] = []
    block.experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    batch, length = config.training.micro_batch_size, config.model.sequence_length
    documents = torch.arange(length).expand(batch, -1) // 5 if config.has_documents else None
    context = micro_batch_context((batch, length), documents, groups, torch.device("cpu"))
    shape = (length // groups.tensor.size(), batch, config.model.hidden_size)
    x_SBD = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    saved = Saved()
    with saved:
        y_SBD = block(x_SBD, context)
    kept = saved.bytes(y_SBD, beside=block.parameters())
    y_SBD.square().sum().backward()
    return kept, rows[0]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_dense_feed_forward_keeps_its_linears_ends(
    ranks: Ranks, tensor: int, activation: str
) -> None:
    config = recompute_config(
        "selective",
        model={"activation": activation},
        feed_forward={"routed_layers": "none"},
        parallel={"tensor": tensor},
    )
    width = (2 if activation == "swiglu" else 1) * config.model.ffn_size // tensor
    tokens = config.training.micro_batch_size * config.model.sequence_length
    kept = 4 * tokens * (config.model.hidden_size // tensor + width)
    assert [n for n, _ in ranks(tensor).run(kept_of_block, config, "feed_forward")] == [
        kept
    ] * tensor


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_dense_attention_keeps_its_linears_ends(ranks: Ranks, tensor: int, documents: bool) -> None:
    config = recompute_config(
        "selective",
        model={"attention_dropout": 0.3},
        attention={"routed_layers": "none"},
        parallel={"tensor": tensor},
        data={"reset_at_documents": documents},
    )
    hidden, heads = config.model.hidden_size, config.model.num_heads
    qkv = hidden // heads * (heads + 2 * config.model.kv_heads)
    tokens = config.training.micro_batch_size * config.model.sequence_length
    kept = 4 * tokens * (2 * hidden + qkv) // tensor
    assert [n for n, _ in ranks(tensor).run(kept_of_block, config, "attention")] == [kept] * tensor


@pytest.mark.parametrize("kind", ["feed_forward", "attention"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_routed_block_keeps_rows_and_no_pairs(ranks: Ranks, tensor: int, kind: str) -> None:
    """Of all ranks: their tokens' hidden states, rows that arrived, and what routing keeps: less
    than six numbers for each token and expert."""
    config = recompute_config("selective", parallel={"tensor": tensor})
    by_rank = ranks(tensor).run(kept_of_block, config, kind)
    tokens = config.training.micro_batch_size * config.model.sequence_length
    experts = config.routed_blocks[f"layers.0.{kind}"]
    moved = sum(rows for _, rows in by_rank) if tensor > 1 else 0
    hidden_states = config.model.hidden_size * (tokens + moved)
    assert sum(kept for kept, _ in by_rank) <= 4 * (hidden_states + 6 * tokens * experts)


def without_gradients(config: RunConfig) -> tuple[Tensor, list[float]]:
    """Losses of an evaluation, and the tokens that each routed block counted."""
    model = build_model(config, start(config)).eval()
    tokens = random_tokens(config)
    with torch.no_grad():
        losses = model(tokens, tokens.roll(-1, 1))
    return losses, [b.statistics.pack().sum().item() for b in model.routed_blocks().values()]


def test_evaluation_is_as_it_was(ranks: Ranks) -> None:
    (plain, counted), *others = (
        ranks(1).run(without_gradients, recompute_config(recompute, 0.3))[0] for recompute in MODES
    )
    assert counted == [0.0] * 4
    for losses, counted in others:
        assert torch.equal(losses, plain)
        assert counted == [0.0] * 4


def gradients_above_a_frozen_embedding(config: RunConfig) -> list[str]:
    """Parameters without a gradient when the layers' input asks for none."""
    model = build_model(config, start(config))
    tokens = random_tokens(config)
    assert model.embedding is not None
    model.embedding.requires_grad_(False)
    model(tokens, tokens.roll(-1, 1)).mean().backward()
    return [name for name, param in model.named_parameters() if param.grad is None]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_an_input_without_gradient_costs_no_parameter_its_own(
    ranks: Ranks, recompute: Recompute
) -> None:
    config = recompute_config(recompute)
    found = ranks(1).run(gradients_above_a_frozen_embedding, config)[0]
    assert found == ["embedding.tokens.weight"]
