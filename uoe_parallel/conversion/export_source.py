"""A checkpoint that is brought to transformers, read by one process whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.checkpoint import CheckpointReader, locate_checkpoint
from uoe_parallel.config.load import resolve_config
from uoe_parallel.config.schema import Precision, RunConfig
from uoe_parallel.data.tokenizer import Tokenizer, build_tokenizer, num_model_ids
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.device import DTYPES

_OVER_VOCABULARY = ("embedding.tokens.weight", "head.logits.weight")


class Source:
    """The checkpoint of a causal model, and what is needed to understand it.

    path: as in `checkpoint.locate_checkpoint`. precision: of what is exported; None means that of
    the run. Raises UserError if there is no whole checkpoint, if its tokenizer can't be opened, or
    for another task.
    """

    def __init__(self, path: Path, precision: Precision | None = None) -> None:
        self.reader: CheckpointReader = locate_checkpoint(path, None)
        tree: Any = self.reader.state["config"]
        source = f"the config saved in {self.reader.path}"
        self.config: RunConfig = resolve_config(tree, source=source)
        task = self.config.model.task
        if task != "next_token":
            raise UserError(
                f"{self.reader.path}: model.task is {task}, and only models that predict the next "
                "token can be brought to transformers; use a run of next_token"
            )
        self.precision: Precision = precision or self.config.training.precision
        self.tokenizer: Tokenizer = build_tokenizer(self.config.data.tokenizer)
        self.vocab_size = num_model_ids(self.tokenizer, task)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is exported."""
        return DTYPES[self.precision]

    @property
    def parameters(self) -> list[str]:
        """The names of all."""
        names = [key.partition("/") for key in self.reader.keys()]  # noqa: SIM118 - not a dict
        return [name for name, _, part in names if part == "weight"]

    def shape(self, parameter: str) -> tuple[int, ...]:
        """That of the model; over the vocabulary without the rows that only fill it up."""
        shape = self.reader.shape(f"{parameter}/weight")
        return (self.vocab_size, *shape[1:]) if parameter in _OVER_VOCABULARY else shape

    def read(self, parameter: str) -> Tensor:
        """All of `shape`, of `dtype`. Raises OSError if a file has gone."""
        shape = self.shape(parameter)
        value = self.reader.read(f"{parameter}/weight", (0,) * len(shape), shape)
        return value.to(self.dtype)
