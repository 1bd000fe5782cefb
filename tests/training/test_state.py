"""What each rank writes of a checkpoint: its own part of the state, of which nothing is sent."""

from __future__ import annotations

import pytest
import torch

from tests.harness import Ranks
from tests.model.cases import build_model, start
from tests.tiny import tiny_config
from uoe_parallel.analysis.observe import CollectiveObserver
from uoe_parallel.config.schema import RunConfig


def _captured(config: RunConfig) -> tuple[int, int]:
    """Collectives of a capture, and bytes that this rank is to write of parameters."""
    from uoe_parallel.training.pipeline import build_engine
    from uoe_parallel.training.state import capture

    groups = start(config)
    engine = build_engine(build_model(config, groups), config, groups, torch.device("cpu"))
    with CollectiveObserver(groups) as observer:
        pieces = capture(engine.deepspeed, engine.model, groups, masters=True)
    parameters = [p for p in pieces if p.key.endswith(("/weight", "/master", "_avg", "_avg_sq"))]
    assert len(parameters) > len(pieces) / 2
    return len(observer.calls), sum(piece.tensor.nbytes for piece in parameters)


LAYOUTS = [
    *((2, "fp32", {"zero_stage": stage}) for stage in (0, 2, 3)),
    *((2, "bf16", {"expert": 2, "zero_stage": stage}) for stage in (0, 1)),
    (4, "fp32", {"tensor": 2}),
    (4, "fp32", {"expert": 2, "zero_stage": 0}),
]


@pytest.mark.parametrize(("world", "precision", "parallel"), LAYOUTS)
def test_ranks_write_even_parts_and_send_nothing(
    ranks: Ranks, world: int, precision: str, parallel: dict[str, int]
) -> None:
    config = tiny_config(
        parallel=parallel, training={"precision": precision, "micro_batch_size": 1}
    )
    found = ranks(world).run(_captured, config)
    assert [calls for calls, _ in found] == [0] * world
    written = [size for _, size in found]
    # Of a tensor group the first writes what all of it hold: norms, routers, biases.
    assert max(written) < 1.2 * sum(written) / world
    assert min(written) > 0.8 * sum(written) / world
