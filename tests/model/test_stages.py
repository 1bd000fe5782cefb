"""Stages are runs of layers, none empty, and no other cut is better."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.model.stages import layer_cost, stage_layers


def _config(num_layers: int, routed: list[int], ffn_size: int = 64) -> RunConfig:
    return tiny_config(
        model={"num_layers": num_layers, "ffn_size": ffn_size},
        feed_forward={"routed_layers": routed},
        attention={"routed_layers": "none"},
    )


@st.composite
def cuts(draw: st.DrawFn) -> tuple[RunConfig, int, int]:
    """A config, a number of stages and the size of the vocabulary."""
    num_layers = draw(st.integers(1, 7))
    routed = draw(st.lists(st.integers(0, num_layers - 1), unique=True))
    config = _config(num_layers, routed, ffn_size=8 * draw(st.integers(1, 40)))
    return config, draw(st.integers(1, num_layers)), draw(st.sampled_from([8, 264, 100_000]))


@given(cuts())
def test_no_cut_is_better(case: tuple[RunConfig, int, int]) -> None:
    config, num_stages, vocab_size = case
    num_layers = config.model.num_layers
    costs = [layer_cost(config, layer) for layer in range(num_layers)]
    costs[-1] += config.model.hidden_size * vocab_size

    def unevenness(ends: tuple[int, ...]) -> tuple[int, int]:
        edges = (0, *ends, num_layers)
        stages = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        return max(stages), sum(cost**2 for cost in stages)

    stages = stage_layers(config, num_stages, vocab_size)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert len(stages) == num_stages and all(len(stage) > 0 for stage in stages)
    best = min(map(unevenness, itertools.combinations(range(1, num_layers), num_stages - 1)))
    assert unevenness(tuple(stage.stop for stage in stages[:-1])) == best


def test_a_routed_layer_counts_what_it_computes() -> None:
    routed, dense = (layer_cost(_config(2, [0]), layer) for layer in (0, 1))
    # 3 of 8 experts of a SwiGLU block.
    assert dense - routed == 3 * 32 * 64 * (1 - 3 / 8)


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(8, [range(2), range(2, 4)]), (10_000, [range(3), range(3, 4)])]
)
def test_the_head_counts_to_the_last_stage(vocab_size: int, expected: list[range]) -> None:
    assert stage_layers(_config(4, []), 2, vocab_size) == expected


def test_many_layers_take_no_time_that_grows_with_the_number_of_cuts() -> None:
    stages = stage_layers(_config(96, list(range(0, 96, 2))), 32, 264)
    assert sum(map(len, stages)) == 96
