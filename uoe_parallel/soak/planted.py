"""The job's program: `uoe_parallel.pretrain` with faults planted inside, and a log of its steps.

    torchrun ... -m uoe_parallel.soak.planted PLAN --config FILE ...

Product code has no switches for faults: this module replaces functions of it and calls `main`.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uoe_parallel import pretrain
from uoe_parallel.parallel.groups import rank_from_environment
from uoe_parallel.soak.plan import Place, Plan

_TICK = 0.02
"""Seconds."""


def main(arguments: Sequence[str]) -> int:
    """Run the program with what the plan, the first argument, says."""
    plan, rank = Plan.read(Path(arguments[0])), rank_from_environment()
    plan.note(rank=rank)
    start_groups = pretrain.start_groups

    def start(*args: Any) -> Any:
        groups = start_groups(*args)
        _plant(plan, rank)  # not before the device is chosen, see pretrain._run
        return groups

    pretrain.start_groups = start
    return pretrain.main(arguments[1:])


def _plant(plan: Plan, rank: int) -> None:
    from uoe_parallel.training import engine, trainer

    owner: Any = trainer.Trainer
    take_step = owner.train_step
    running: list[Any] = []

    def train_step(trainer: Any) -> Any:
        running[:] = [trainer]
        result = take_step(trainer)
        if rank == 0:
            plan.note(rank=rank, step=trainer.step)
        taken = time.monotonic()
        while time.monotonic() - taken < float(Path(plan.pace).read_text()):
            time.sleep(_TICK)
        return result

    owner.train_step = train_step
    if plan.nan_batch is not None and rank == 0:
        _plant_nan(engine.TrainingEngine, running, plan)
    if plan.flip is not None and rank == plan.flip.rank:
        _plant_flip(engine.TrainingEngine, plan.flip)
    if plan.kill_in_save is not None and rank == plan.kill_in_save.rank:
        _plant_kill(plan.kill_in_save)


def _plant_nan(owner: Any, running: Sequence[Any], plan: Plan) -> None:
    token_losses = owner.token_losses

    def losses(*args: Any) -> Tensor:
        result: Tensor = token_losses(*args)
        if running and running[0].progress.batch == plan.nan_batch and result.requires_grad:
            result.register_hook(lambda gradient: gradient * math.nan)
            if plan.nan_mark is not None:
                Path(plan.nan_mark).touch()
        return result

    owner.token_losses = losses


def _plant_flip(owner: Any, place: Place) -> None:
    step = owner.step

    def flipping(engine: Any, *args: Any) -> Any:
        result = step(engine, *args)
        if place.takes_place():
            norm = next(param for param in engine.model.parameters() if param.dim() == 1)
            norm.data.view(torch.int32)[0] ^= 1 << 20
        return result

    owner.step = flipping


def _plant_kill(place: Place) -> None:
    fsync, calls = os.fsync, 0

    def dying(descriptor: int) -> None:
        nonlocal calls
        if Path(place.armed).exists():
            calls += 1
            if calls >= place.call and place.takes_place():
                os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = dying


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
