"""DeepSpeed's config, derived from ours, so that users write one file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from uoe_parallel.config.faults import ABSENT, Fault, show
from uoe_parallel.config.schema import RunConfig

_REFUSED = {
    "optimizer": (
        "is not DeepSpeed's to build: the trainer gives it an optimizer",
        "set training.learning_rate, betas, eps and weight_decay instead",
    ),
    "scheduler": (
        "is not DeepSpeed's to build: the trainer sets the learning rates",
        "set training.learning_rate, min_learning_rate and warmup_steps instead",
    ),
    "gradient_accumulation_steps": (
        "follows from the batch sizes and the number of ranks",
        "remove it and set training.global_batch_size and training.micro_batch_size",
    ),
    "managed_gradient_accumulation": (
        "would take the accumulation boundary from the trainer",
        "remove it",
    ),
    "gradient_allreduce_op": (
        "would change the scale of the gradients, which the loss already accounts for",
        "remove it",
    ),
    "bfloat16": ("is an old name of bf16", "set training.precision instead"),
    "amp": ("would change the precision of the run", "set training.precision instead"),
    "torch_autocast": ("would change the precision of the run", "set training.precision instead"),
    "tensor_parallel": (
        "would split layers that are already split",
        "set parallel.tensor instead",
    ),
    "sequence_parallel_size": (
        "would split sequences that are already split",
        "set parallel.sequence_parallel instead",
    ),
    "activation_checkpointing": (
        "is not read, and partitioning would mix activations that are already split",
        "set training.recompute instead",
    ),
    "expert_parallel": (
        "would place experts that are already placed",
        "set parallel.tensor instead",
    ),
}
"""Keys that belong to us whatever their value: the reason and the mend."""


@dataclass(frozen=True)
class _Setting:
    key: str
    """Dotted path in DeepSpeed's config."""
    value: object
    source: str | None = None
    """The field of ours it follows from, None where it holds for every run."""


def _derived(config: RunConfig) -> list[_Setting]:
    """What the passthrough may repeat but not contradict."""
    training = config.training
    return [
        _Setting("train_batch_size", training.global_batch_size, "training.global_batch_size"),
        _Setting(
            "train_micro_batch_size_per_gpu",
            training.micro_batch_size,
            "training.micro_batch_size",
        ),
        # Always written, since DeepSpeed clips at 1.0 unless told otherwise; 0 means off there
        # too.
        _Setting("gradient_clipping", training.gradient_clipping, "training.gradient_clipping"),
        _Setting("zero_optimization.stage", config.parallel.zero_stage, "parallel.zero_stage"),
        # An expert that no token chose has no gradient, which is not a mistake.
        _Setting("zero_optimization.ignore_unused_parameters", True),
        _Setting("bf16.enabled", training.precision == "bf16", "training.precision"),
        _Setting("fp16.enabled", False, "training.precision"),
        # On by default, and it corrupts activations that sequence parallelism has cut already.
        _Setting("pipeline.pipe_partitioned", False),
        _Setting("pipeline.grad_partitioned", False),
        # Layers recompute themselves; DeepSpeed would recompute the embedding too, whose input has
        # no gradient, and lose that of its weights.
        _Setting("pipeline.activation_checkpoint_interval", 0, "training.recompute"),
        # DeepSpeed knows only its own optimizers as tested with ZeRO and with offloading.
        _Setting("zero_allow_untested_optimizer", True),
        _Setting("zero_force_ds_cpu_optimizer", False),
    ]


def _defaults(config: RunConfig) -> list[_Setting]:
    """What the passthrough may replace."""
    settings = [_Setting("steps_per_print", None), _Setting("wall_clock_breakdown", False)]
    if config.training.precision == "bf16":
        # DeepSpeed's default reduces in bf16. Under ZeRO 1 it then rounds the accumulated
        # gradient, on a single rank too, and accumulating in fp32 was for nothing.
        settings.append(_Setting("communication_data_type", "fp32"))
        # Without ZeRO, DeepSpeed accumulates bf16 gradients in bf16 and refuses fp32.
        if config.parallel.zero_stage > 0:
            settings.append(_Setting("data_types.grad_accum_dtype", "fp32"))
    return settings


def deepspeed_config(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """DeepSpeed's config for a run on `data_parallel_size` data-parallel ranks.

    `config` was checked by `load_config` and by the layout: its passthrough contradicts nothing
    and its batch sizes divide. With bf16, gradients are reduced in fp32 and, from ZeRO 1 on,
    accumulated in fp32; without ZeRO DeepSpeed can accumulate them in bf16 only.
    """
    training = config.training
    sequences = training.micro_batch_size * data_parallel_size
    assert training.global_batch_size % sequences == 0
    assert not any(passthrough_faults(config))
    result = copy.deepcopy(config.deepspeed)
    for setting in _defaults(config):
        if _get(result, setting.key) is ABSENT:
            _put(result, setting.key, setting.value)
    for setting in _derived(config):
        _put(result, setting.key, setting.value)
    result["gradient_accumulation_steps"] = training.global_batch_size // sequences
    return result


def passthrough_faults(config: RunConfig) -> Iterator[Fault]:
    """Keys of the `deepspeed` section that are ours to set, or contradict what we set."""
    given = config.deepspeed
    for key, (problem, mend) in _REFUSED.items():
        if key in given:
            yield Fault((f"deepspeed.{key}",), given[key], problem, mend)
    settings = [*_derived(config), *_defaults(config)]
    sections = {setting.key.split(".")[0] for setting in settings if "." in setting.key}
    for section in sorted(sections & given.keys()):
        if not isinstance(given[section], dict):
            mend = "give its keys as a mapping or remove it"
            yield Fault((f"deepspeed.{section}",), given[section], "is not a section", mend)
    accumulate = _get(given, "data_types.grad_accum_dtype")
    bf16_alone = config.training.precision == "bf16" and config.parallel.zero_stage == 0
    if bf16_alone and accumulate not in (ABSENT, "bf16"):
        yield Fault(
            ("deepspeed.data_types.grad_accum_dtype", "parallel.zero_stage", "training.precision"),
            accumulate,
            "is not possible in bf16 without ZeRO, where DeepSpeed accumulates in bf16",
            "set parallel.zero_stage to 1 or more, or remove it",
        )
    for setting in _derived(config):
        value = _get(given, setting.key)
        if value is ABSENT or value == setting.value:
            continue
        field, shown = f"deepspeed.{setting.key}", show(setting.value)
        if setting.source is None:
            yield Fault((field,), value, f"has to be {shown} here", "remove it")
            continue
        problem = f"contradicts {shown}, which follows from {setting.source}"
        mend = f"remove it and set {setting.source} to what you want"
        yield Fault((field, setting.source), value, problem, mend)


def _get(tree: dict[str, Any], key: str) -> object:
    """The value at a dotted path of at most two parts; ABSENT if there is none."""
    section, _, name = key.rpartition(".")
    inner = tree.get(section, {}) if section else tree
    return inner.get(name, ABSENT) if isinstance(inner, dict) else ABSENT


def _put(tree: dict[str, Any], key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    inner = tree.setdefault(section, {}) if section else tree
    inner[name] = value
