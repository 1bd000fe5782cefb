"""With all experts on, a routed model is the dense one of the same weights (UoE 6.1), on every
layout and under every rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, random_tokens, start
from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig

DENSE = {"routed_layers": "none"}
RULES: dict[str, dict[str, Any]] = {
    "top-k, shared": {"shared_experts": 1},
    "segments, thresholds": {
        "selection": "threshold",
        "segment_length": 4,
        "segment_experts": 3,
        "gate": "softmax",
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "replicated": (2, {"tensor": 2, "sequence_parallel": False}),
    "wide experts": (2, {"expert": 2}),
}


def logits(config: RunConfig, documents: bool) -> tuple[Tensor, Tensor]:
    """fp64, with all experts on and then as routed, [B, S, V] of two packed documents or one."""
    groups = start(config)
    model = build_model(config, groups, torch.float64).eval()
    tokens = random_tokens(config)
    ids = (torch.arange(tokens.shape[1]) >= 6).long().expand_as(tokens) if documents else None
    with torch.no_grad():
        with model.all_experts():
            dense = model(tokens, documents_BS=ids)
        routed = model(tokens, documents_BS=ids)
    assert isinstance(dense, Tensor) and isinstance(routed, Tensor)
    return dense, routed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_all_experts_are_the_dense_model(ranks: Ranks, rule: str, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    for documents in (False, True):
        plain = tiny_config(feed_forward=DENSE, attention=DENSE)
        [(expected, _)] = ranks(1).run(logits, plain, documents)
        config = tiny_config(feed_forward=RULES[rule], attention=RULES[rule], parallel=parallel)
        for dense, routed in ranks(world_size).run(logits, config, documents):
            torch.testing.assert_close(dense, expected, rtol=1e-11, atol=1e-12)
            assert not torch.allclose(routed, expected, rtol=1e-3)
