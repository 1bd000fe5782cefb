"""From a checkpoint into a model, with nothing of an optimizer."""

from __future__ import annotations

import torch

from uoe_parallel.checkpoint import CheckpointReader
from uoe_parallel.inference.rules import restore_rules
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.sharding import named_shards


@torch.no_grad()
def load_weights(model: LanguageModel, reader: CheckpointReader) -> None:
    """This rank's part of every parameter, and the state of routing rules.

    Not collective. Raises OSError if a file has gone since it was found whole.
    """
    for name, param, shard in named_shards(model, model.groups):
        param.copy_(reader.read(f"{name}/weight", shard.offsets, shard.shape))
    restore_rules(model.routed_blocks(), reader)
