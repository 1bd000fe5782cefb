"""What runs inside the rank processes for the tests of floating-point operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.analysis.work_cases import recorded
from tests.model.cases import build_model, random_tokens, start
from uoe_parallel.analysis.flop_counter import flop_counter
from uoe_parallel.analysis.flops import Computation, micro_batch_flops
from uoe_parallel.analysis.simulate import build_stage, simulated_groups
from uoe_parallel.analysis.work import expected_work
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.trainer import Trainer

Flops = dict[tuple[str, str], int]
"""By "forward" or "backward", what that recomputes included, and "attention" or "products"."""


def pass_of_a_model(
    config: RunConfig, documents_BS: Tensor | None = None
) -> tuple[Flops, list[Computation]]:
    """One micro-batch's passes as counted, and as computed of what they were given to do."""
    groups = start(config)
    model = build_model(config, groups)
    tokens = random_tokens(config, seed=groups.data_rank)[: config.training.micro_batch_size]
    labels = tokens.roll(-1, 1)
    if (classes := config.model.num_classes) is not None:
        labels = tokens[:, :1] % classes
    if documents_BS is not None:  # others for each data-parallel rank
        documents_BS = documents_BS.roll(groups.data_rank, 0)
    recomputes = config.training.recompute == "full"
    forward, backward = flop_counter(), flop_counter()
    with recorded(model, recomputes=recomputes) as record:
        with forward:
            loss = model(tokens, labels, documents_BS).mean()
        with backward:
            loss.backward()
    stage = build_stage(config, groups)
    ((work, context),) = record.micro_batches(list(stage.routed_blocks()))
    given = None if documents_BS is None else context
    counted = _counted("forward", forward) | _counted("backward", backward)
    return counted, micro_batch_flops(stage, config, work, given)


def step_of_a_trainer(config: RunConfig) -> tuple[int, list[Computation]]:
    """All micro-batches of a step."""
    groups = start(config)
    trainer = Trainer(config, groups, use_device(0), TrainingConsole(quiet=True))
    recomputes = config.training.recompute == "full"
    with recorded(trainer.model, recomputes=recomputes) as record, flop_counter() as counter:
        trainer.train_step()
    stage, computed = build_stage(config, groups), []
    for work, context in record.micro_batches(list(stage.routed_blocks())):
        computed += micro_batch_flops(stage, config, work, context)
    return counter.get_total_flops(), computed


def _counted(phase: str, counter: FlopCounterMode) -> Flops:
    return _by_kind(phase, counter.get_flop_counts()["Global"])


def _by_kind(phase: str, counts: Mapping[Any, int]) -> Flops:
    flops: Flops = defaultdict(int)
    for operator, count in counts.items():
        scores = "attention" in str(operator) or "bmm" in str(operator)
        flops[phase, "attention" if scores else "products"] += count
    return dict(flops)


def forward_by_module(config: RunConfig) -> dict[str, Flops]:
    """Counted in the forward pass of one micro-batch, by the name of each module."""
    groups = start(config)
    model = build_model(config, groups)
    tokens = random_tokens(config, seed=groups.data_rank)[: config.training.micro_batch_size]
    with flop_counter() as counter:
        model(tokens, tokens.roll(-1, 1))
    return {name: _by_kind("forward", counts) for name, counts in counter.get_flop_counts().items()}


def expected_flops(config: RunConfig, world_size: int) -> list[list[Computation]]:
    """Of each rank of a world, by kernels that don't pad."""
    dist.destroy_process_group()
    layout, computed = ParallelLayout.from_config(config.parallel, world_size), []
    for rank in range(world_size):
        with simulated_groups(layout, rank) as groups:
            stage = build_stage(config, groups)
            work = expected_work(stage, config)
            computed.append(micro_batch_flops(stage, config, work, pads=False))
    return computed


def parameter_sizes(config: RunConfig) -> dict[str, int]:
    """Elements of each parameter, by name."""
    stage = build_stage(config, start(config))
    return {name: param.numel() for name, param in stage.named_parameters()}
