"""What ranks hold alike is compared bit by bit, and who differs is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import Ranks
from tests.programs import metrics, write_run
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.groups import distributed, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.random import Stream, shared_stream
from uoe_parallel.training import replicas
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.replicas import Replicas, checksum
from uoe_parallel.training.state import base_optimizer, replicated_states
from uoe_parallel.training.trainer import Trainer

NORM = "layers.0.attention_norm.weight"
ROUTER = "layers.0.feed_forward.router.router_weight"
THRESHOLD = "layers.0.feed_forward/router/Threshold/threshold"


def _config(folder: Path, **sections: Any) -> RunConfig:
    small = {"num_layers": sections.get("parallel", {}).get("pipeline", 1), "sequence_length": 8}
    learning = {"selection": "threshold", "threshold_warmup": 1}
    nothing_else = {"validation": None, "test": None}
    sections = {"model": small, "feed_forward": learning, "data": nothing_else} | sections
    return load_config(write_run(folder, **sections))


def _trainer(config: RunConfig) -> Trainer:
    with distributed() as device:
        groups = start_groups(ParallelLayout.from_config(config.parallel, dist.get_world_size()))
        return Trainer(config, groups, device, TrainingConsole(quiet=True))
