"""AdamW over groups of parameters that are treated alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from uoe_parallel.config.schema import TrainingConfig
from uoe_parallel.routing.router import ROUTER_SUFFIX
from uoe_parallel.training.schedule import learning_rate_factor


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Groups "decay", "no_decay" (norms and biases) and "router" (no decay, a rate of its own).

    Each carries its `peak_lr`. Parameters of wide experts are in groups of their own, under the
    name and the mark by which DeepSpeed finds the ranks that share them. Frozen parameters, and
    groups without parameters, are left out.
    """
    members: dict[tuple[str, str | None], list[nn.Parameter]] = defaultdict(list)
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        kind = "decay" if param.ndim >= 2 else "no_decay"
        kind = "router" if name.endswith(ROUTER_SUFFIX) else kind
        members[kind, getattr(param, "group_name", None)].append(param)
    groups = []
    for (kind, wide), params in sorted(members.items(), key=lambda item: str(item[0])):
        decay = config.weight_decay if kind == "decay" else 0.0
        rate = config.learning_rate
        if kind == "router":
            rate = config.router_learning_rate or rate
        group = {"name": kind, "params": params, "weight_decay": decay, "lr": rate, "peak_lr": rate}
        groups.append(group | {"name": wide, "moe": True} if wide else group)
    return groups


def build_optimizer(
    groups: list[dict[str, Any]], config: TrainingConfig, device: torch.device, zero_stage: int
) -> tuple[Optimizer, str]:
    """AdamW in the fastest form this machine has, and that form's name for the log."""
    arguments = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    # In bf16 without ZeRO, DeepSpeed keeps Apex's masters flat, where checkpoints can't reach.
    # Under ZeRO 3 it steps part of a group at a time, and Apex would count each as a step.
    suits_apex = zero_stage in (1, 2) or (zero_stage == 0 and config.precision == "fp32")
    apex_adam = _apex_fused_adam() if device.type == "cuda" and suits_apex else None
    if apex_adam is not None:
        # Apex counts steps per group, from its first step on; a resumed run sets the count before.
        counted = [group | {"step": 0} for group in groups]
        return apex_adam(counted, adam_w_mode=True, **arguments), "apex.optimizers.FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **arguments), "torch.optim.AdamW(fused=True)"


def _apex_fused_adam() -> Callable[..., Optimizer] | None:
    # NVIDIA Apex is built from source; what PyPI calls apex is another project without this name.
    try:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FusedAdam


def set_learning_rates(optimizer: Any, step: int, config: TrainingConfig) -> float:
    """Give every group its rate for optimizer step `step` (from 0); returns the main one.

    A pure function of the step, so that a resumed run needs no saved schedule.
    """
    factor = learning_rate_factor(
        step,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        min_factor=config.min_learning_rate / config.learning_rate,
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return config.learning_rate * factor
