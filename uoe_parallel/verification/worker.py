"""What a rank of a verified run does: the trainer's own steps, on a folder of its own."""

from __future__ import annotations

from datetime import timedelta

from uoe_parallel.checkpoint import save_checkpoint
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.groups import distributed, start_groups, world_size_from_environment
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.verification.record import INITIAL
from uoe_parallel.verification.request import FaultRequest, PlantedFault


def train(config: RunConfig, fault: FaultRequest | None, timeout: float) -> PlantedFault | None:
    """Train to the last step; returns the fault that was planted.

    For every rank of a world that the environment describes as torchrun does. `timeout`: seconds
    that a collective may take.
    """
    layout = ParallelLayout.from_config(config.parallel, world_size_from_environment())
    with distributed(timedelta(seconds=timeout)) as device:
        # DeepSpeed picks its accelerator when it is imported: after the device is chosen.
        from uoe_parallel.training.console import TrainingConsole
        from uoe_parallel.training.state import capture
        from uoe_parallel.training.trainer import Trainer
        from uoe_parallel.verification.faults import plant

        groups = start_groups(layout)
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        planted = plant(fault, trainer.model, groups) if fault else None
        pieces = capture(
            trainer.engine.deepspeed,
            trainer.model,
            groups,
            masters=config.training.precision == "bf16",
        )
        save_checkpoint(trainer.folder.path / INITIAL, 0, pieces, {}, groups.world, keep=1)
        trainer.train()
    return planted
