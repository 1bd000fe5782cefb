"""Other shapes of model than the engine's tests have, each under a layout that is drawn with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.harness import Ranks
from tests.model.cases import relative_difference
from tests.tiny import GPT_2, tiny_config
from tests.training.cases import assemble, run_engine, run_plainly
from uoe_parallel.config.schema import ParallelConfig, RunConfig
from uoe_parallel.parallel.layout import supported_layouts, with_parallel

NAMED: dict[str, tuple[int, dict[str, Any]]] = {
    "stages of unequal length, the later ones without a router": (
        4,
        {
            "model": {"num_layers": 5, "tie_embeddings": False},
            "feed_forward": {"routed_layers": [0]},
            "attention": {"routed_layers": "none"},
            "parallel": {"pipeline": 4, "zero_stage": 1},
        },
    ),
    "wide experts on one stage of two": (
        4,
        {
            "model": {"num_layers": 3},
            "feed_forward": {"routed_layers": [0]},
            "attention": {"routed_layers": [2]},
            "parallel": {"pipeline": 2, "expert": 2, "zero_stage": 1},
        },
    ),
    "heads spread over data ranks too": (
        4,
        {
            "feed_forward": {"spread": "tensor"},
            "attention": {"spread": "expert"},
            "parallel": {"tensor": 2, "expert": 4, "zero_stage": 2},
        },
    ),
    "both kinds of experts over part of the data ranks": (
        8,
        {
            "attention": {"spread": "expert"},
            "parallel": {"tensor": 2, "expert": 4, "zero_stage": 1},
        },
    ),
    "recomputed stages with wide experts": (
        4,
        {
            "training": {"recompute": "full"},
            "parallel": {"pipeline": 2, "expert": 2, "zero_stage": 1},
        },
    ),
    "nothing routed": (
        4,
        {
            "feed_forward": {"routed_layers": "none"},
            "attention": {"routed_layers": "none"},
            "parallel": {"tensor": 2, "pipeline": 2, "expert": 2, "zero_stage": 0},
        },
    ),
    "GPT-2's parts on two stages that share an embedding": (
        2,
        {"model": GPT_2, "parallel": {"pipeline": 2, "zero_stage": 1}},
    ),
    "GPT-2's parts, cut over replicas": (2, {"model": GPT_2, "parallel": {"zero_stage": 3}}),
    "two stages that end in a tied embedding, no bias": (
        2,
        {"model": {"bias": False}, "parallel": {"pipeline": 2, "zero_stage": 1}},
    ),
}
WIDE = {
    "heads spread over data ranks too",
    "both kinds of experts over part of the data ranks",
    "GPT-2's parts, cut over replicas",
}
"""Cases that take many ranks, or that ZeRO makes: without it, their layouts are the engine's."""

FP32 = {"losses": 2e-5, "norms": 2e-5, "tensors": 2e-4, "eps": 1e-3}
FP64 = {"losses": 1e-12, "norms": 1e-11, "tensors": 1e-8, "eps": 1e-6}


def check(ranks: Ranks, world_size: int, config: RunConfig, tolerance: dict[str, float]) -> None:
    """The config's steps are those of plain torch on one rank."""
    alone = with_parallel(config, ParallelConfig(zero_stage=0))
    plain = ranks(1).run(run_plainly, alone)[0]
    outcomes = ranks(world_size).run(run_engine, config)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(plain.losses, rel=tolerance["losses"])
        assert outcome.gradient_norms == pytest.approx(plain.gradient_norms, rel=tolerance["norms"])
    worst, name = relative_difference(assemble(outcomes), assemble([plain]), eps=tolerance["eps"])
    assert worst < tolerance["tensors"], name


def _with_training(sections: dict[str, Any], **training: Any) -> RunConfig:
    training = {"micro_batch_size": 1, **sections.get("training", {}), **training}
    return tiny_config(**{**sections, "training": training})


@pytest.mark.parametrize("case", NAMED)
def test_named_shapes(ranks: Ranks, case: str) -> None:
    world_size, sections = NAMED[case]
    check(ranks, world_size, _with_training(sections), FP32)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in WIDE)) for case in NAMED]
)
def test_named_shapes_in_double_precision(ranks: Ranks, case: str) -> None:
    """Where nothing is lost to rounding, a small mistake has nowhere to hide."""
    world_size, sections = NAMED[case]
    sections = {**sections, "parallel": {**sections["parallel"], "zero_stage": 0}}
    check(ranks, world_size, _with_training(sections, precision="fp64"), FP64)


def layers(count: int) -> st.SearchStrategy[str | list[int]]:
    return st.one_of(
        st.sampled_from(["all", "none"]),
        st.lists(st.integers(0, count - 1), unique=True).map(sorted),
    )


@st.composite
def shapes(draw: st.DrawFn) -> RunConfig:
    num_layers = draw(st.integers(1, 5))
    kv_heads, queries = draw(st.sampled_from([2, 4, 8])), draw(st.integers(1, 2))
    num_experts = draw(st.sampled_from([4, 8, 16]))
    gate, spread = st.sampled_from(["sigmoid", "softmax"]), st.sampled_from(["tensor", "expert"])
    return tiny_config(
        model={
            "num_layers": num_layers,
            "hidden_size": kv_heads * queries * draw(st.sampled_from([2, 4])),
            "ffn_size": num_experts * draw(st.integers(1, 3)),
            "num_heads": kv_heads * queries,
            "num_kv_heads": kv_heads,
            "sequence_length": 16,
            "activation": draw(st.sampled_from(["gelu", "gelu_tanh", "swiglu"])),
            "norm": draw(st.sampled_from(["rms_norm", "layer_norm"])),
            "positions": draw(st.sampled_from(["rotary", "learned"])),
            "bias": draw(st.booleans()),
            "tie_embeddings": draw(st.booleans()),
        },
        feed_forward={
            "num_experts": num_experts,
            "top_k": draw(st.integers(1, num_experts)),
            "gate": draw(gate),
            "routed_layers": draw(layers(num_layers)),
            "spread": draw(spread),
        },
        attention={
            "top_k": draw(st.integers(1, kv_heads)),
            "gate": draw(gate),
            "routed_layers": draw(layers(num_layers)),
            "spread": draw(spread),
        },
        training={"micro_batch_size": 1, "precision": "fp64"},
    )


@pytest.mark.parametrize(
    ("world_size", "examples"),
    [(2, 2), (4, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 20), (4, 20)))],
)
@pytest.mark.timeout(300)
def test_drawn_shapes_and_layouts(ranks: Ranks, world_size: int, examples: int) -> None:
    @settings(
        max_examples=examples,
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(shapes(), st.data())
    def run(config: RunConfig, data: st.DataObject) -> None:
        layouts = supported_layouts(config, world_size)
        name = data.draw(st.sampled_from(sorted(layouts)))
        check(ranks, world_size, with_parallel(config, layouts[name]), FP64)

    run()
