"""Whole models of every kind of norm, position, activation and head grouping are those of the
definitions, and know of a document what it says alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.harness import Ranks
from tests.model.cases import build_model, random_tokens, start
from tests.model.rules import packed
from tests.tiny import GPT_2, USED_VOCAB_SIZE, tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.model.language_model import LanguageModel, TransformerBlock
from uoe_parallel.model.norm import Norm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.sharding import gather_full, load_full

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT-2": GPT_2 | {"num_kv_heads": 8},
    "Llama": {"bias": False, "tie_embeddings": False, "rope_base": 100.0},
    "mixed": GPT_2 | {"norm": "rms_norm", "activation": "gelu", "num_kv_heads": 2, "bias": False},
    "bidirectional": GPT_2 | {"positions": "rotary", "task": "masked_token"},
}
IDS = packed(16, [[5, 11], [16], [7, 8], [1, 2, 12]])
LAYOUTS = [{}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": False}]


def config_of(model: dict[str, Any], parallel: dict[str, Any]) -> RunConfig:
    experts = {"top_k": 2, "num_experts": 4}
    return tiny_config(
        model=model,
        feed_forward=experts | {"routed_layers": [1]},
        attention={"routed_layers": [0], "top_k": 1},
        parallel=parallel,
    )


def random_model(config: RunConfig, groups: ParallelGroups) -> LanguageModel:
    """fp64, with no weight that is one or zero."""
    model = build_model(config, groups, torch.float64)
    generator = torch.Generator().manual_seed(2)
    for param in model.parameters():
        if param.ndim == 1:
            full = gather_full(param, groups.tensor)
            noise = torch.randn(full.shape, generator=generator, dtype=torch.float64)
            load_full(param, full + 0.3 * noise, groups.tensor)
    return model


def normalized(x: Tensor, norm: Norm) -> Tensor:
    if norm.bias is None:
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def plain_logits(model: LanguageModel, config: RunConfig, tokens: Tensor, ids: Tensor) -> Tensor:
    """[B, S, V] of the dense model. Collective over the tensor group."""
    sizes, group = config.model, model.groups.tensor
    assert model.embedding is not None and model.final_norm is not None
    table = gather_full(model.embedding.tokens.weight, group)
    x = table[tokens].transpose(0, 1)
    if sizes.positions == "learned":
        assert model.embedding.positions is not None
        place = torch.tensor([reference.places(row) for row in ids]).t()
        x = x + model.embedding.positions[place]
    base = sizes.rope_base if sizes.positions == "rotary" else None
    width = sizes.hidden_size // sizes.num_heads
    for layer in model.layers.values():
        assert isinstance(layer, TransformerBlock)
        attention, mlp = layer.attention.experts, layer.feed_forward.experts
        assert isinstance(attention, SelectiveMultiHeadAttention)
        assert isinstance(mlp, UnionOfMLPExperts)
        y = normalized(x, layer.attention_norm)
        x = x + reference.dense_attention(y, ids, attention.to_dense(), width, base, sizes.causal)
        y = normalized(x, layer.feed_forward_norm)
        x = x + reference.dense_mlp(y, mlp.to_dense(), sizes.activation)
    if not sizes.tie_embeddings:
        table = gather_full(dict(model.named_parameters())["head.logits.weight"], group)
    logits = normalized(x, model.final_norm) @ table.T
    return logits.transpose(0, 1)[..., :USED_VOCAB_SIZE]


@torch.no_grad()
def ours_and_plain(parallel: dict[str, Any]) -> dict[tuple[str, bool], tuple[Tensor, Tensor]]:
    """By architecture, and whether sequences hold several documents: logits with all experts on,
    and those of the definitions."""
    groups = start(tiny_config(parallel=parallel))
    found = {}
    for name, fields in ARCHITECTURES.items():
        config = config_of(fields, parallel)
        model = random_model(config, groups)
        tokens = random_tokens(config)
        for documents in (None, IDS):
            ids = torch.zeros_like(tokens) if documents is None else documents
            with model.all_experts():
                logits = model(tokens, None, documents)
            assert isinstance(logits, Tensor)
            plain = plain_logits(model, config, tokens, ids)
            found[name, documents is not None] = logits[ids >= 0], plain[ids >= 0]
    return found


@pytest.mark.parametrize("parallel", LAYOUTS, ids=["one", "sharded", "replicated"])
def test_all_experts_on_are_the_model_of_the_definitions(
    ranks: Ranks, parallel: dict[str, Any]
) -> None:
    for found in ranks(parallel.get("tensor", 1)).run(ours_and_plain, parallel):
        for case, (ours, plain) in found.items():
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-11, msg=str(case))


@torch.no_grad()
def together_and_alone(parallel: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Logits of each document, routed, as one of several in a row and by itself."""
    groups = start(tiny_config(parallel=parallel))
    config = config_of(GPT_2, parallel)
    model = random_model(config, groups)
    tokens = random_tokens(config)
    together = model(tokens, None, IDS)
    assert isinstance(together, Tensor)
    pairs = []
    for row, ids in zip(range(len(tokens)), IDS, strict=True):
        for document in ids[ids >= 0].unique():
            mine = (ids == document).nonzero().flatten()
            # As long as a shard allows, with padding behind.
            alone = torch.zeros(1, tokens.shape[1], dtype=torch.int64)
            alone[0, : len(mine)] = tokens[row, mine]
            padding = torch.arange(tokens.shape[1]) >= len(mine)
            logits = model(alone, None, -padding.long().unsqueeze(0))
            assert isinstance(logits, Tensor)
            pairs.append((together[row, mine], logits[0, : len(mine)]))
    return pairs


@pytest.mark.parametrize("parallel", LAYOUTS[:2], ids=["one", "sharded"])
def test_learned_positions_are_places_in_a_document(ranks: Ranks, parallel: dict[str, Any]) -> None:
    for pairs in ranks(parallel.get("tensor", 1)).run(together_and_alone, parallel):
        assert len(pairs) == 8
        for together, alone in pairs:
            torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-11)


@torch.no_grad()
def before_and_after(split: int) -> tuple[Tensor, Tensor]:
    """Logits before and after tokens from `split` on change."""
    config = config_of(GPT_2, {})
    model = random_model(config, start(config))
    tokens = random_tokens(config)
    changed = tokens.clone()
    changed[:, split:] = (changed[:, split:] + 1) % USED_VOCAB_SIZE
    before, after = model(tokens), model(changed)
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    return before, after


def test_no_later_token_shows(ranks: Ranks) -> None:
    split = 9
    before, after = ranks(1).run(before_and_after, split)[0]
    assert (before[:, :split] - after[:, :split]).abs().max() < 1e-12
    assert (before[:, split:] - after[:, split:]).abs().amin(dim=(0, 2)).max() > 0
