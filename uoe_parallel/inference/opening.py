"""A model of a checkpoint, on the layout of this launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from uoe_parallel.checkpoint import locate_checkpoint, read_manifest
from uoe_parallel.config.load import resolve_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.tokenizer import (
    Tokenizer,
    build_tokenizer,
    num_model_ids,
    padded_vocab_size,
)
from uoe_parallel.experts.backends import pick_backend
from uoe_parallel.inference.same_tokenizer import check_tokenizer
from uoe_parallel.inference.weights import load_weights
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.model.relay import relay_last_to_all, relay_to_all
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.device import DTYPES
from uoe_parallel.parallel.groups import (
    ParallelGroups,
    distributed,
    start_groups,
    world_size_from_environment,
)
from uoe_parallel.parallel.layout import ParallelLayout, layout_faults


@dataclass(frozen=True)
class OpenedModel:
    """A model in evaluation mode, and what belongs to it."""

    config: RunConfig
    """That of the run that saved it, with this launch's layout."""
    step: int
    """Optimizer steps that it has seen."""
    model: LanguageModel
    tokenizer: Tokenizer
    groups: ParallelGroups
    device: torch.device

    def logits(self, tokens_BS: Tensor, memory: DecodingMemory | None = None) -> Tensor:
        """Logits of the used vocabulary [B, S, V], the same on every rank of a replica of the
        model. Collective over these. memory: as in `LanguageModel.hidden`."""
        return relay_to_all(self.model, tokens_BS, memory)

    def next_logits(
        self, tokens_BS: Tensor, documents_BS: Tensor | None, memory: DecodingMemory
    ) -> Tensor:
        """Logits of the used vocabulary after the last token of each text, [B, V], as `logits`.
        Within `LanguageModel.replicated_tokens`."""
        return relay_last_to_all(self.model, tokens_BS, documents_BS, memory)


def saved_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that the checkpoint at `path` was saved with, with overrides on top and checked
    for the ranks of this launch: each holds the whole model if they don't say otherwise, whatever
    the layout that it was trained on. Each rank reads by itself.

    Raises UserError if there is no checkpoint, or for faults of the config.
    """
    world_size = world_size_from_environment()
    tree: Any = read_manifest(path).state["config"]
    tree["parallel"] = {}
    # There is no batch of training to be shared out.
    tree["training"]["global_batch_size"] = world_size * tree["training"]["micro_batch_size"]
    check = partial(layout_faults, world_size=world_size)
    return resolve_config(tree, overrides, [check], source=f"the config saved in {path}")


@contextmanager
def opened(path: Path, overrides: Sequence[str] = ()) -> Iterator[OpenedModel]:
    """torch.distributed and the model of the checkpoint at `path` for the life of the block, which
    every rank of the launch enters.

    path: a checkpoint, or a run folder for its newest whole one. overrides: as on the command line
    of a run, such as "parallel.tensor=2". Raises UserError on every rank.
    """
    with distributed() as device:
        with shared_fate(f"{path} cannot be opened", "See to the run", dist.group.WORLD):
            config = saved_config(path, overrides)
        layout = ParallelLayout.from_config(config.parallel, world_size_from_environment())
        yield open_model(path, config, start_groups(layout), device.torch_device)


def open_model(
    path: Path, config: RunConfig, groups: ParallelGroups, device: torch.device
) -> OpenedModel:
    """The model of the checkpoint at `path` (as in `opened`), which `config` describes. Collective
    over all ranks; raises UserError on every one of them."""
    reader = locate_checkpoint(path, groups.world)
    with shared_fate(f"{reader.path} cannot be opened", "See to the named file", groups.world):
        tokenizer = build_tokenizer(config.data.tokenizer)
        check_tokenizer(reader, config.data.tokenizer, tokenizer)
    precision = DTYPES[config.training.precision]
    backend, _ = pick_backend(device, precision, config.training.expert_products, groups.world)
    num_ids = num_model_ids(tokenizer, config.model.task)
    model = LanguageModel(
        config,
        groups,
        vocab_size=padded_vocab_size(num_ids, config.model.vocab_multiple),
        used_vocab_size=num_ids,
        backend=backend,
        dtype=precision,
    ).to(device)
    with shared_fate(f"{reader.path} cannot be read", "See to the named file", groups.world):
        load_weights(model, reader)
    return OpenedModel(config, reader.step, model.eval(), tokenizer, groups, device)
