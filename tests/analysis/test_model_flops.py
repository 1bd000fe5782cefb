"""What a token costs a whole model, and how many parameters that has, from its config alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.analysis.flop_cases import expected_flops, parameter_sizes, pass_of_a_model
from tests.harness import Ranks
from tests.tiny import GPT_2, VOCAB_SIZE, tiny_config
from uoe_parallel.analysis.flops import Computation, model_flops_per_token, parameter_counts
from uoe_parallel.config.schema import RunConfig

DENSE: dict[str, Any] = {"routed_layers": "none"}
ALL_ON: dict[str, dict[str, Any]] = {"feed_forward": {"top_k": 8}, "attention": {"top_k": 4}}
ALL_KEYS: dict[str, Any] = {"keys_and_values": "all"}
WIDE: dict[str, Any] = {"tensor": 2, "expert": 4}


def _needed(by_rank: list[list[Computation]]) -> int:
    """Of all ranks, without what only looks on."""
    return sum(c.flops for rank in by_rank for c in rank if c.purpose != "routing statistics")


def _tokens(config: RunConfig, replicas: int = 1) -> int:
    return replicas * config.training.micro_batch_size * config.model.sequence_length


@pytest.mark.parametrize(
    ("world", "sections"),
    [
        (1, {}),
        (1, {"model": {"activation": "gelu", "tie_embeddings": False}}),
        (2, {"parallel": {"tensor": 2}, "attention": ALL_KEYS}),
        (4, {"parallel": WIDE, "attention": {"routed_layers": [0]}, "feed_forward": DENSE}),
    ],
    ids=["one", "gelu", "tp2-sp", "tp2-sp-dp2-ep4"],
)
def test_all_experts_on(ranks: Ranks, world: int, sections: dict[str, dict[str, Any]]) -> None:
    merged = sections | {name: ALL_ON[name] | sections.get(name, {}) for name in ALL_ON}
    config = tiny_config(**merged)
    by_rank = ranks(world).run(pass_of_a_model, config)
    counted = sum(sum(counts.values()) for counts, _ in by_rank)
    only_seen = sum(
        c.flops for _, computed in by_rank for c in computed if c.purpose == "routing statistics"
    )
    flops = model_flops_per_token(config, VOCAB_SIZE)
    tokens = _tokens(config, replicas=2 if world == 4 else 1)
    assert flops.routed * tokens == pytest.approx(counted - only_seen, rel=1e-12)
    routers = sum(c.flops for _, computed in by_rank for c in computed if c.purpose == "routers")
    assert flops.dense_twin * tokens == pytest.approx(counted - only_seen - routers, rel=1e-12)


@pytest.mark.parametrize(
    ("world", "sections"),
    [
        (1, {"feed_forward": {"top_k": 2}}),
        (2, {"parallel": {"tensor": 2}, "feed_forward": DENSE, "attention": ALL_KEYS}),
        (
            2,
            {
                "parallel": {"tensor": 2},
                "feed_forward": {"num_experts": 10, "shared_experts": 2, "top_k": 4},
                "attention": {"patch_length": 4},
                "model": {"ffn_size": 80},
            },
        ),
        (
            4,
            {
                "parallel": {"pipeline": 2},
                "feed_forward": {"top_k": 2, "segment_length": 4, "segment_experts": 4},
                "attention": {"selection": None, "segment_length": 4, "segment_experts": 1},
            },
        ),
        (
            1,
            {
                "model": {"task": "classification", "num_classes": 3},
                "feed_forward": {"routed_layers": [1], "top_k": 4},
                "attention": DENSE,
            },
        ),
    ],
    ids=["one", "queries", "shared", "segments", "classes"],
)
def test_even_routes(ranks: Ranks, world: int, sections: dict[str, dict[str, Any]]) -> None:
    config = tiny_config(**sections)
    (by_rank,) = ranks(1).run(expected_flops, config, world)
    replicas = world // config.parallel.tensor // config.parallel.pipeline
    per_token = model_flops_per_token(config, VOCAB_SIZE).routed
    assert per_token * _tokens(config, replicas) == pytest.approx(_needed(by_rank), rel=1e-12)


MODELS: dict[str, dict[str, Any]] = {
    "routed": {},
    "dense": {"feed_forward": DENSE, "attention": DENSE},
    "no bias, two heads": {
        "model": {"bias": False, "tie_embeddings": False, "activation": "gelu", "num_kv_heads": 2},
        "attention": ALL_KEYS | {"routed_layers": [1], "top_k": 1},
    },
    "GPT-2's parts": {"model": GPT_2},
    "shared": {
        "feed_forward": {"shared_experts": 1, "segment_length": 4, "segment_experts": 5},
        "attention": {"selection": None, "segment_length": 4, "segment_experts": 3},
    },
    "classes": {"model": {"task": "classification", "num_classes": 3}, "feed_forward": DENSE},
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(ranks: Ranks, name: str) -> None:
    config = tiny_config(**MODELS[name])
    [sizes] = ranks(1).run(parameter_sizes, config)
    counts = parameter_counts(config, VOCAB_SIZE)
    assert counts.total == sum(sizes.values())
    active = sum(size * _share(config, parameter) for parameter, size in sizes.items())
    assert counts.active == round(active)


def _share(config: RunConfig, parameter: str) -> float:
    """Of a parameter, that a token's pass touches."""
    block, _, rest = parameter.partition(".experts.")
    if block not in config.routed_blocks or rest.endswith(("output.bias", "fc2.bias")):
        return 1.0
    routing, experts = config.routing_of(block), config.routed_blocks[block]
    share = (routing.chosen_experts + routing.shared_experts) / experts
    if rest.startswith("qkv") and config.attention.keys_and_values == "all":
        queries = config.model.num_heads // config.model.kv_heads
        return (queries * share + 2) / (queries + 2)
    return share


def test_model_of_200_billion_parameters() -> None:
    """By hand, without a process group."""
    config = tiny_config(
        model={
            "num_layers": 64,
            "hidden_size": 16384,
            "ffn_size": 40960,
            "num_heads": 128,
            "num_kv_heads": 16,
            "sequence_length": 8192,
            "bias": False,
            "tie_embeddings": False,
        },
        feed_forward={"num_experts": 128, "top_k": 16},
        attention={"routed_layers": "none"},
    )
    vocab, hidden = 131072, 16384
    attention = hidden * (2 * hidden + 2 * 2048)
    mlp = 3 * hidden * 40960
    rest = 64 * (attention + 2 * hidden + 128 * hidden) + 2 * vocab * hidden + hidden
    counts = parameter_counts(config, vocab)
    assert (counts.total, counts.active) == (rest + 64 * mlp, rest + 64 * mlp // 8)
    scores = 2 * 7 * 8192 * hidden
    flops = model_flops_per_token(config, vocab)
    head, routers = vocab * hidden, 128 * hidden
    assert flops.routed == 64 * (6 * (attention + mlp // 8 + routers) + scores) + 6 * head
    assert flops.dense_twin == 64 * (6 * (attention + mlp) + scores) + 6 * head
