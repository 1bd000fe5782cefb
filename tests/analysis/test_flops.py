"""What is computed for a rank is what torch's counter sees in its passes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from tests.analysis.flop_cases import Flops, pass_of_a_model
from tests.harness import Ranks
from tests.tiny import tiny_config
from uoe_parallel.analysis.flops import Computation

DENSE: dict[str, Any] = {"routed_layers": "none"}
FIRST: dict[str, Any] = {"routed_layers": [0]}
ALL_KEYS: dict[str, Any] = {"keys_and_values": "all"}
FULL: dict[str, Any] = {"recompute": "full"}
SELECTIVE: dict[str, Any] = {"recompute": "selective"}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one full": (1, {"training": FULL}),
    "one selective all keys": (1, {"training": SELECTIVE, "attention": ALL_KEYS}),
    "one dropout": (1, {"model": {"attention_dropout": 0.1}, "attention": FIRST}),
    "tp2-sp": (2, {"parallel": {"tensor": 2}, "model": {"activation": "gelu"}}),
    "tp2": (
        2,
        {
            "parallel": {"tensor": 2, "sequence_parallel": False},
            "feed_forward": FIRST,
            "attention": FIRST | ALL_KEYS,
            "training": SELECTIVE,
        },
    ),
    "tp2-sp dense": (
        2,
        {
            "parallel": {"tensor": 2},
            "feed_forward": DENSE,
            "attention": DENSE,
            "training": SELECTIVE,
        },
    ),
    "dp2-ep2": (
        2,
        {
            "parallel": {"expert": 2},
            "attention": ALL_KEYS | {"spread": "expert"},
            "training": FULL,
        },
    ),
    "tp2-sp-dp2-ep4": (
        4,
        {"parallel": {"tensor": 2, "expert": 4}, "attention": {"spread": "expert"}},
    ),
}


def _summed(computed: list[Computation]) -> Flops:
    sums: Flops = defaultdict(int)
    for c in computed:
        phase = "forward" if c.phase == "forward" else "backward"
        sums[phase, "attention" if c.purpose == "attention" else "products"] += c.flops
    return dict(sums)


@pytest.mark.parametrize("name", CASES)
def test_as_counted(ranks: Ranks, name: str) -> None:
    world, sections = CASES[name]
    for counted, computed in ranks(world).run(pass_of_a_model, tiny_config(**sections)):
        assert _summed(computed) == counted
