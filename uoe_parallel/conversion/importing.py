"""A dense model's folder into a run folder with a checkpoint of step 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from uoe_parallel.checkpoint import save_in_parts
from uoe_parallel.checkpoint.folders import list_checkpoints
from uoe_parallel.config.load import save_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.conversion.import_architectures import architecture_of
from uoe_parallel.conversion.import_config import copy_tokenizer, imported_config
from uoe_parallel.conversion.import_layers import LayerImport, Vocabulary
from uoe_parallel.conversion.import_sample import read_sample
from uoe_parallel.conversion.import_source import DenseSource
from uoe_parallel.conversion.import_text import Losses, Routers, Slices
from uoe_parallel.data.tokenizer import build_tokenizer, padded_vocab_size
from uoe_parallel.errors import UserError
from uoe_parallel.inference.same_tokenizer import STATE_KEY
from uoe_parallel.parallel.groups import (
    ParallelGroups,
    distributed,
    start_groups,
    world_size_from_environment,
)
from uoe_parallel.parallel.layout import ParallelLayout

ONE_RANK = ParallelLayout(
    world_size=1, tensor=1, pipeline=1, expert=1, sequence_parallel=False, zero_stage=0
)


@dataclass(frozen=True)
class ImportRequest:
    """What to import, and how."""

    source: Path
    """A folder with config.json, safetensors and a tokenizer."""
    run_dir: Path
    """Gets checkpoints/, config.yaml and the tokenizer."""
    overrides: Sequence[str] = ()
    """Of the config that the source makes, such as "feed_forward.num_experts=16"."""
    slices: Slices = "contiguous"
    routers: Routers = "random"
    text: Sequence[Path] = ()
    """Files of sample text, for clusters, for routers by activation and to judge the result."""
    tokens: int = 32768
    """Of sample text."""


@dataclass(frozen=True)
class Imported:
    """What came of it."""

    config: RunConfig
    checkpoint: Path
    source_ids: int
    """Rows of the source's embedding."""
    used_ids: int
    """Ids of the tokenizer, which the model predicts."""
    sample_tokens: int
    losses: Losses | None
    """None without sample text."""


Progress = Callable[[int], AbstractContextManager[Callable[[], object]]]
"""Of so many layers: a block in which to call what it yields when one is done."""


def import_model(request: ImportRequest, progress: Progress) -> Imported:
    """Import, as the only process of a launch. Raises UserError, and leaves no checkpoint then."""
    if world_size_from_environment() > 1:
        raise UserError("an import is the work of one process; start it without a launcher")
    with distributed() as device:
        return import_on(request, progress, start_groups(ONE_RANK), device.torch_device)


def import_on(
    request: ImportRequest, progress: Progress, groups: ParallelGroups, device: torch.device
) -> Imported:
    """As `import_model`, where torch.distributed runs; `groups` are those of one rank."""
    if not request.text and (request.slices == "clusters" or request.routers == "activation"):
        raise UserError(
            "--slices clusters and --routers activation look at what the model does on text: give "
            "it as --text FILE"
        )
    root = request.run_dir / "checkpoints"
    if list_checkpoints(root):
        raise UserError(f"{request.run_dir} already has checkpoints; name a new run folder")
    source = DenseSource(request.source)
    architecture = architecture_of(source)
    config = imported_config(source, architecture, request.run_dir, request.overrides)
    try:
        copy_tokenizer(source, config)
        tokenizer = build_tokenizer(config.data.tokenizer)
        vocabulary = Vocabulary(
            tokenizer.size, padded_vocab_size(tokenizer.size, config.model.vocab_multiple)
        )
        sample = None
        if request.text:
            context = config.model.sequence_length
            sample = read_sample(request.text, tokenizer, request.tokens, context)
        layers = LayerImport(architecture, config, vocabulary, groups, device, source.dtype())
        with progress(config.model.num_layers) as advance:
            parts = layers.parts(request.slices, request.routers, sample, advance)
            state = {
                "config": config.model_dump(mode="json"),
                STATE_KEY: tokenizer.fingerprint,
            }
            checkpoint = save_in_parts(root, 0, parts, state)
        save_config(config, request.run_dir / "config.yaml")
    except OSError as error:
        raise UserError(f"{request.run_dir} cannot be written: {error}") from error
    tokens = 0 if sample is None else sample.num_tokens
    return Imported(
        config, checkpoint, architecture.vocab_size, tokenizer.size, tokens, layers.losses
    )
