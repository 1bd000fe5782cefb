"""What runs on ranks, and run folders that nobody trained."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.model.cases import build_model, start
from tests.tiny import tiny_config
from uoe_parallel.checkpoint import Piece, save_checkpoint
from uoe_parallel.config.load import save_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import distributed, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.verification.record import INITIAL


def parameter_names(config: RunConfig) -> list[str]:
    return [name for name, _ in build_model(config, start(config)).named_parameters()]


def gradients_seen(config: RunConfig) -> list[dict[str, Tensor]]:
    """Train to the end on one rank; every step's gradients, as they were before clipping."""
    from uoe_parallel.training.console import TrainingConsole
    from uoe_parallel.training.trainer import Trainer

    with distributed() as device:
        groups = start_groups(ParallelLayout.from_config(config.parallel, 1))
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        newest: dict[str, Tensor] = {}
        steps: list[dict[str, Tensor]] = []

        def watch(name: str, param: nn.Parameter) -> None:
            def look(param: Tensor) -> None:
                assert param.grad is not None
                newest[name] = param.grad.clone()

            param.register_post_accumulate_grad_hook(look)

        for name, param in trainer.model.named_parameters():
            watch(name, param)
        step = trainer.train_step

        def train_step() -> Any:
            result = step()
            steps.append(dict(newest))
            return result

        trainer.train_step = train_step
        trainer.train()
    return steps


def sum_of_ranks(first: int) -> tuple[int, str]:
    """Proves that the ranks have met."""
    with distributed():
        world = torch.distributed.group.WORLD
        assert world is not None
        total = comm.sum_over(torch.tensor(first + world.rank()), world, purpose=Purpose.OTHER)
    return int(total), os.environ["WORLD_SIZE"]


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("broken\nin two lines")
    threading.Event().wait()


def die_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        os._exit(7)
    threading.Event().wait()


def hang_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        threading.Event().wait()


def mistake() -> None:
    raise UserError("field: no; mend it")


@dataclass(frozen=True)
class Step:
    """What a step leaves behind, whatever made it so."""

    loss: float
    norm: float
    """Before clipping."""
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def write_record(
    folder: Path,
    steps: Sequence[Step],
    initial: dict[str, Tensor] | None = None,
    **sections: Any,
) -> Path:
    """The folder of a run of `steps`, such as the trainer writes it; returns it."""
    config = tiny_config(**sections)
    beta, limit = config.training.betas[0], config.training.gradient_clipping
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    moments: dict[str, Tensor] = {}
    with (folder / "metrics.jsonl").open("w") as metrics:
        for number, step in enumerate(steps, start=1):
            clipping = min(1.0, limit / (step.norm + 1e-6)) if limit else 1.0
            for name, gradient in step.gradients.items():
                before = moments.get(name, torch.zeros_like(gradient))
                moments[name] = beta * before + (1 - beta) * clipping * gradient
            entries = {f"{name}/exp_avg": moment for name, moment in moments.items()}
            entries |= {f"{name}/weight": weight for name, weight in step.weights.items()}
            _save(folder / "checkpoints", number, entries)
            report = {"step": number, "kind": "train", "loss": step.loss}
            metrics.write(json.dumps(report | {"gradient_norm": step.norm}) + "\n")
    if initial is not None:
        _save(folder / INITIAL, 0, {f"{name}/weight": w for name, w in initial.items()})
    return folder


def _save(root: Path, step: int, entries: dict[str, Tensor]) -> None:
    pieces = [Piece.whole(key, tensor.contiguous()) for key, tensor in entries.items()]
    save_checkpoint(root, step, pieces, {"identity": {"tokens of it": 1}}, None, keep=None)
