"""Parts of a stage in numbers, and what the numbers rest on."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness import Ranks
from tests.tiny import tiny_config
from uoe_parallel.analysis.activations import Activations
from uoe_parallel.analysis.parts import Bytes, Part, Point, elements, joined, stacked
from uoe_parallel.analysis.simulate import build_stage, simulated_groups
from uoe_parallel.analysis.work import expected_work
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.layout import ParallelLayout


def _made_sizes(config: RunConfig) -> tuple[list[int], list[int]]:
    """Elements that have gradients at each point, and those of the last parameters of a model."""
    dist.destroy_process_group()
    with simulated_groups(ParallelLayout.from_config(config.parallel, 2), 0) as groups:
        model = build_stage(config, groups)
        work = expected_work(model, config)
        stage = Activations(model, config, work, on_cuda=False).stage()
        sizes = [param.numel() for param in model.parameters()]
        return stage.points.made.tolist(), list(accumulate(reversed(sizes), initial=0))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"bias": True}, "training": {"recompute": "selective"}},
        {"model": {"activation": "swiglu"}, "training": {"recompute": "full"}},
        {"model": {"tie_embeddings": False}, "feed_forward": {"routed_layers": "none"}},
        {"attention": {"routed_layers": "none"}},
    ],
)
def test_gradients_come_from_the_last_parameter_to_the_first(
    ranks: Ranks, changes: dict[str, Any]
) -> None:
    ((made, last),) = ranks(1).run(_made_sizes, tiny_config(**changes))
    assert made == sorted(made) and made[0] == 0
    assert set(made) <= set(last)


def test_alike_parts_in_numbers_are_those_one_after_the_other() -> None:
    def param(size: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(size))

    def layer() -> Part:
        first, second = [param(3)], [param(5), param(7)]
        points = [
            Point(Bytes(2, 3, 4), second),
            Point(Bytes(9, 0, 1), (), second),
            Point(Bytes(1, 1, 1), first, second),
        ]
        return Part(Bytes(10, 20, 30), Bytes(40, 20, 35), points, [*first, *second])

    entry = Part(Bytes(1), Bytes(2), [Point(Bytes(3), [embedding := param(2)])], [embedding])
    head = Part(Bytes(4), Bytes(50), [Point(Bytes(6))])
    alike = layer()
    whole = joined([entry, layer(), layer(), head])
    stage = stacked([entry, alike, alike, head])
    assert (stage.kept, stage.forward) == (whole.kept, whole.forward)
    points = stage.points
    assert points.held.tolist() == [list(p.held.numbers) for p in whole.points]
    assert points.making.tolist() == [elements(p.making) for p in whole.points]
    assert points.made.tolist() == [elements(p.made) for p in whole.points]
    assert points.last.tolist() == [elements(p.made[-1:]) for p in whole.points]
    assert points.held.dtype == np.int64
