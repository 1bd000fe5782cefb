"""First weights, and which model a block of separate experts is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, start
from tests.tiny import tiny_config
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.parallel.sharding import gather_full

MIXTURE: dict[str, Any] = {
    "initialization": "separate",
    "gate": "softmax_of_chosen",
    "routed_layers": [1],
}


def _outputs(feed_forward: dict[str, Any], tensor: int) -> dict[str, Tensor]:
    """The full second matrices of both layers' feed-forwards."""
    config = tiny_config(feed_forward=feed_forward, parallel={"tensor": tensor})
    groups = start(config)
    model = build_model(config, groups)
    return {
        name: gather_full(param, groups.tensor)
        for name, param in model.named_parameters()
        if name.endswith("feed_forward.experts.fc2.weight")
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_separate_experts_begin_as_blocks_as_narrow_as_themselves(
    ranks: Ranks, world_size: int
) -> None:
    """And a dense layer's experts, which nothing makes separate, as they always do."""
    [slices, *_] = ranks(world_size).run(_outputs, {}, world_size)
    [separate, *_] = ranks(world_size).run(_outputs, MIXTURE, world_size)
    dense, routed = slices
    assert torch.equal(separate[dense], slices[dense])
    # 8 experts, 3 of them chosen.
    torch.testing.assert_close(separate[routed], slices[routed] * 8**0.5 / 3)


def _beside_a_mixture() -> tuple[Tensor, Tensor]:
    """A block's output, and a plain mixture's: gates that sum to one over experts of their own."""
    config = tiny_config(feed_forward=MIXTURE, model={"bias": False})
    model = build_model(config, start(config), torch.float64)
    block = model.routed_blocks()["layers.1.feed_forward"]
    assert isinstance(block.experts, UnionOfMLPExperts)
    x_SBD = torch.randn(16, 4, 32, generator=torch.Generator().manual_seed(2)).double()
    context = model.context((4, 16), None, x_SBD.device)
    dense, chosen = block.experts.to_dense(), config.feed_forward.top_k
    x_TD = x_SBD.flatten(0, 1)
    scores_TE = x_TD @ block.get_parameter("router_weight").double().T
    best_TE = scores_TE >= scores_TE.topk(chosen).values[:, -1:]
    gates_TE = scores_TE.masked_fill(~best_TE, -torch.inf).softmax(-1)
    assert dense.gate_FD is not None
    gate, up, down = (
        w.chunk(8, dim) for w, dim in ((dense.gate_FD, 0), (dense.up_FD, 0), (dense.down_DF, 1))
    )
    expected_TD = torch.zeros_like(x_TD)
    for expert in range(8):
        hidden = torch.nn.functional.silu(x_TD @ gate[expert].T) * (x_TD @ up[expert].T)
        expected_TD += gates_TE[:, expert : expert + 1] * (hidden @ (chosen * down[expert]).T)
    return block(x_SBD, context).detach().flatten(0, 1), expected_TD.detach()


def test_it_is_the_usual_mixture(ranks: Ranks) -> None:
    """Whose experts' second matrices are those here times the number of chosen ones."""
    [(found, expected)] = ranks(1).run(_beside_a_mixture)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
