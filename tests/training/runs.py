"""Runs of a few steps inside the rank processes, and what was seen of them."""

from __future__ import annotations

import io
from contextlib import closing, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.programs import write_run
from uoe_parallel.checkpoint import find_checkpoint
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.groups import distributed, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.metrics import Values
from uoe_parallel.training.trainer import Trainer


class Crash(Exception):
    """The end of the program in the middle of the loop."""


class Step(NamedTuple):
    """What a rank saw of a step."""

    loss: float
    gradient_norm: float
    random: float
    """A number drawn after the step, from a stream that differs between ranks."""


class Life(NamedTuple):
    """What a rank saw of one call of the program."""

    steps: dict[int, Step]
    validation: float | None
    err: str


class _Witness(TrainingConsole):
    def __init__(self, crash_after: int | None) -> None:
        super().__init__(quiet=True)
        self.steps: dict[int, Step] = {}
        self._crash_after = crash_after

    def report(self, step: int, values: Values) -> None:
        super().report(step, values)
        loss, norm = values["loss"], values["gradient_norm"]
        assert isinstance(loss, float) and isinstance(norm, float)
        # Dropout has streams of its own; the drawn amount tells ranks apart.
        draws = torch.rand(dist.get_rank() + 1)
        self.steps[step] = Step(loss, norm, draws[-1].item())
        if step == self._crash_after:
            raise Crash


def live(config: RunConfig, crash_after: int | None = None) -> Life:
    """On every rank: train to the last step, or until right after step `crash_after`."""
    err, console = io.StringIO(), _Witness(crash_after)
    with redirect_stderr(err), distributed() as device:
        groups = start_groups(ParallelLayout.from_config(config.parallel, dist.get_world_size()))
        trainer = Trainer(config, groups, device, console)
        # The process goes on to other cases, unlike a program that ends: nothing frees its lock.
        with closing(trainer.folder):
            try:
                trainer.train()
            except Crash:
                return Life(console.steps, None, err.getvalue())
            return Life(console.steps, trainer.evaluate("validation").loss, err.getvalue())


def config_of(folder: Path, **sections: Any) -> RunConfig:
    return load_config(write_run(folder, **sections))


def tensors_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every entry of the run's newest checkpoint, which is of `step`."""
    reader = find_checkpoint(run_dir / "checkpoints", None)
    assert reader is not None and reader.step == step
    keys = reader.keys()
    return {key: reader.read(key) for key in keys}
