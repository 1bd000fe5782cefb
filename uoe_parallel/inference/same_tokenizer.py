"""Weights and tokenizer belong together: another one gives ids of the same range other meanings."""

from __future__ import annotations

from typing import Any

from uoe_parallel.checkpoint import CheckpointReader
from uoe_parallel.data.tokenizer import Tokenizer
from uoe_parallel.errors import UserError

STATE_KEY = "tokenizer"
"""In the state of a checkpoint: the fingerprint of the tokenizer that its model reads."""


def check_tokenizer(reader: CheckpointReader, name: str, tokenizer: Tokenizer) -> None:
    """Raises UserError if the checkpoint is of another tokenizer than this one, which
    `data.tokenizer` names `name`. Files may have moved. Not collective."""
    state: Any = reader.state
    saved = state.get(STATE_KEY, tokenizer.fingerprint)
    if saved != tokenizer.fingerprint:
        raise UserError(
            f"{reader.path} was saved with data.tokenizer = {state['config']['data']['tokenizer']} "
            f"(fingerprint {saved}), and now data.tokenizer = {name} has fingerprint "
            f"{tokenizer.fingerprint}; name the tokenizer that the model has learned with"
        )
