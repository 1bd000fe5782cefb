"""Dropout differs between ranks that hold other tokens or other heads, and only there."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import Ranks
from tests.model.cases import build_model, full_gradients, random_tokens, start
from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.backends import LoopBackend
from uoe_parallel.model.embedding import Embedding
from uoe_parallel.model.language_model import LanguageModel, TransformerBlock
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.random import random_states

P = 0.4


def dropout_config(tensor: int = 1, sequence_parallel: bool = True, **sections: Any) -> RunConfig:
    return tiny_config(
        **{
            "model": {"dropout": P, "attention_dropout": P},
            "parallel": {"tensor": tensor, "sequence_parallel": sequence_parallel},
        }
        | sections
    )


def only(model: LanguageModel, kind: type[nn.Module]) -> Any:
    """The first module of a kind."""
    return next(module for module in model.modules() if isinstance(module, kind))


def hidden_mask(config: RunConfig) -> Tensor:
    """What becomes of ones in a layer's dropout."""
    dropout = only(build_model(config, start(config)), TransformerBlock).dropout
    return dropout(torch.ones(16, 4, config.model.hidden_size))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_hidden_dropout_agrees_where_tokens_do(ranks: Ranks, sequence_parallel: bool) -> None:
    config = dropout_config(2, sequence_parallel)
    masks = ranks(4).run(hidden_mask, config)  # (data, tensor) = (0, 0), (0, 1), (1, 0), (1, 1)
    for i, j in product(range(4), range(4)):
        same_tokens = i == j or (i // 2 == j // 2 and not sequence_parallel)
        assert torch.equal(masks[i], masks[j]) == same_tokens
    for mask in masks:
        kept = mask > 0
        torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - P)))
        assert 1 - kept.double().mean() == pytest.approx(P, abs=0.05)


def dropped_outputs(config: RunConfig) -> list[tuple[Tensor, Tensor]]:
    """fp64: before and after dropout, outputs of the embedding, of attention, of feed-forward."""
    model = build_model(config, start(config), torch.float64)
    embedding: Embedding = only(model, Embedding)
    block: TransformerBlock = only(model, TransformerBlock)
    outputs: list[Tensor] = []
    sums: list[Tensor] = []

    def note(half: nn.Module, inputs: object, output: Tensor) -> None:
        outputs.append(output)

    block.attention.register_forward_hook(note)
    block.feed_forward.register_forward_hook(note)
    for norm in (block.attention_norm, block.feed_forward_norm):
        norm.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0]))
    tokens = random_tokens(config)
    batch, length = tokens.shape
    context = model.context((batch, length), None, tokens.device)
    sums.append(block(embedding(tokens, context.documents), context))
    before, middle, after = sums
    whole = embedding.eval()(tokens, context.documents)
    return [(whole, before), (outputs[0], middle - before), (outputs[1], after - middle)]


@torch.no_grad()
def test_dropout_is_of_the_embedding_and_of_each_block_before_the_sum(ranks: Ranks) -> None:
    config = dropout_config(model={"dropout": P})
    for before, after in ranks(1).run(dropped_outputs, config)[0]:
        dropped = after == 0
        assert dropped.double().mean() == pytest.approx(P, abs=0.05)
        expected = (before / (1 - P)).masked_fill(dropped, 0)
        torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-12)


def hidden_and_replicated_gradients(config: RunConfig) -> tuple[Tensor, dict[str, Tensor]]:
    groups = start(config)
    model = build_model(config, groups)
    hidden = model.hidden(random_tokens(config))
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    for param in model.parameters():
        if param.grad is None:  # not reached
            param.grad = torch.zeros_like(param)
    return hidden.detach(), full_gradients(model, groups)


def test_replicated_hidden_states_stay_equal(ranks: Ranks) -> None:
    config = dropout_config(2, sequence_parallel=False)
    (hidden, gradients), (other, other_gradients) = ranks(2).run(
        hidden_and_replicated_gradients, config
    )
    assert torch.equal(hidden, other)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


def attended_ones(config: RunConfig) -> Tensor:
    """Attention weights summed over what each token sees, by head of this rank: [heads, tokens].

    Every weight is that of a projection to ones, and gates are 1: without dropout the sums are 1.
    """
    groups = start(config)
    model = build_model(config, groups, torch.float64, LoopBackend())
    attention: SelectiveMultiHeadAttention = only(model, SelectiveMultiHeadAttention)
    found: list[Tensor] = []
    attention.output.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "qkv" in name or "router" in name:
                param.fill_(float(name.endswith("bias")))
        model.hidden(random_tokens(config))
    return _by_head(found[0], attention, groups)


def _by_head(
    attended: Tensor, attention: SelectiveMultiHeadAttention, groups: ParallelGroups
) -> Tensor:
    width, per_expert = attention.head_width, attention.queries_per_expert
    if attended.ndim == 3:  # dense: [S, B, heads x d]
        return attended.unflatten(-1, (-1, width))[..., 0].flatten(0, 1).T
    experts = attention.num_experts // groups.tensor.size()
    by_expert = attended.unflatten(0, (experts, -1)).unflatten(-1, (per_expert, width))
    return by_expert[..., 0].permute(0, 2, 1).flatten(0, 1)


@pytest.mark.parametrize("routed_layers", ["all", "none"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_attention_dropout_differs_between_heads_and_ranks(
    ranks: Ranks, routed_layers: str, sequence_parallel: bool
) -> None:
    attention = {"routed_layers": routed_layers, "top_k": 4}
    plain = dropout_config(2, sequence_parallel, model={"bias": True}, attention=attention)
    for sums in ranks(4).run(attended_ones, plain):
        torch.testing.assert_close(sums, torch.ones_like(sums))
    config = dropout_config(
        2, sequence_parallel, model={"attention_dropout": P}, attention=attention
    )
    by_rank = ranks(4).run(attended_ones, config)
    heads = torch.cat(by_rank)
    assert heads.shape == (4 * config.model.num_heads // 2, 64)
    assert len({tuple(head.tolist()) for head in heads}) == len(heads)
    assert heads.mean().item() == pytest.approx(1, abs=0.05)


def what_moves(config: RunConfig, training: bool) -> tuple[Tensor, list[str]]:
    """Losses of a forward and backward pass, and which random states it changed."""
    groups = start(config)
    model = build_model(config, groups).train(training)
    before = random_states(groups)
    tokens = random_tokens(config)
    losses = model(tokens, tokens.roll(-1, 1))
    losses.mean().backward()
    after = random_states(groups)
    return losses.detach(), [key for key in before if not torch.equal(before[key], after[key])]


def test_nothing_is_drawn_without_dropout_or_in_evaluation(ranks: Ranks) -> None:
    without, with_dropout = tiny_config(), dropout_config()
    expected, moved = ranks(1).run(what_moves, without, True)[0]
    assert moved == []
    evaluated, moved = ranks(1).run(what_moves, with_dropout, False)[0]
    assert moved == [] and torch.equal(evaluated, expected)
    dropped, moved = ranks(1).run(what_moves, with_dropout, True)[0]
    assert len(moved) == 2 and not torch.equal(dropped, expected)


def sampled(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Logits with tokens on every rank, in evaluation and in training."""
    model = build_model(config, start(config))
    tokens = random_tokens(config)
    with model.replicated_tokens():
        return model.eval()(tokens), model.train()(tokens)


def test_tokens_that_sampling_replicates_are_dropped_alike(ranks: Ranks) -> None:
    config = dropout_config(2, model={"dropout": P})
    (evaluated, trained), other = ranks(2).run(sampled, config)
    assert torch.equal(evaluated, other[0]) and torch.equal(trained, other[1])
    assert not torch.equal(evaluated, trained)
