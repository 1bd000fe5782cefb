"""The config of an imported model: its sizes from the source, the rest from overrides."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uoe_parallel.config.load import resolve_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.conversion.import_architectures import Architecture
from uoe_parallel.conversion.import_source import CONFIG_NAME, DenseSource
from uoe_parallel.errors import UserError

_FREE = {"dropout", "attention_dropout", "init_std", "router_init_std", "vocab_multiple"}
"""Fields of the section `model` that the source's weights do not fix."""

_TRAINING: dict[str, Any] = {
    "steps": 1000,
    "global_batch_size": 8,
    "micro_batch_size": 1,
    "learning_rate": 1e-4,
}
"""What a config has to have, for whoever trains the model to choose."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def imported_config(
    source: DenseSource, architecture: Architecture, run_dir: Path, overrides: Sequence[str]
) -> RunConfig:
    """Raises UserError with every fault, also of overrides that change what the weights fix."""
    tokenizer = next((name for name in _TOKENIZERS if (source.folder / name).is_file()), None)
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": dict(architecture.model),
        "data": {"train": "data/train"},
        "training": {
            **_TRAINING,
            "precision": "bf16" if source.dtype() is torch.bfloat16 else "fp32",
        },
    }
    if tokenizer is not None:
        tree["data"]["tokenizer"] = str(run_dir / tokenizer)
    elif not any(override.partition("=")[0].strip() == "data.tokenizer" for override in overrides):
        raise UserError(
            f"{source.folder} has no {' or '.join(_TOKENIZERS)}: save it there (transformers: "
            "tokenizer.save_pretrained(folder)), or give data.tokenizer=... among the overrides"
        )
    made = f"the config made of {source.folder / CONFIG_NAME}"
    config = resolve_config(tree, overrides, source=made)
    if config.run_dir != str(run_dir):
        raise UserError(
            f"run_dir={config.run_dir}: the run folder is {run_dir}; leave the override out"
        )
    _check_sizes(config, architecture, source)
    return config


def _check_sizes(config: RunConfig, architecture: Architecture, source: DenseSource) -> None:
    sizes, chosen = architecture.model, config.model.model_dump(exclude=_FREE)
    length = config.model.sequence_length
    if config.model.positions == "rotary" and length <= sizes["sequence_length"]:
        chosen["sequence_length"] = sizes["sequence_length"]
    defaults = type(config.model).model_validate(sizes).model_dump()
    for name, value in chosen.items():
        if value != defaults[name]:
            raise UserError(
                f"model.{name}={value}: the weights of {source.folder} are those of "
                f"model.{name}={defaults[name]}; leave the override out"
            )
    if architecture.window is not None and architecture.window < length:
        raise UserError(
            f"{source.folder / CONFIG_NAME}: sliding_window = {architecture.window} is shorter "
            f"than the context of {length}, and our attention has no window; up to its length both "
            f"are the same: give model.sequence_length={architecture.window}"
        )


def copy_tokenizer(source: DenseSource, config: RunConfig) -> None:
    """Put the source's tokenizer where the config says it is, unless that names another one. Raises
    OSError."""
    place = Path(config.data.tokenizer)
    if place.parent == Path(config.run_dir) and (source.folder / place.name).is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / place.name, place)
