"""What preprocessing has written beside a corpus about how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uoe_parallel.data.tokenizer import Tokenizer
from uoe_parallel.errors import UserError

_LARGEST = 2**26
"""Bytes of a summary. A file of this name that is larger is text itself, and would fill memory."""


def check_made_with(prefix: str, name: str, tokenizer: Tokenizer) -> None:
    """Raises UserError if <prefix>.json says that the corpus was made with another tokenizer than
    this one, which `data.tokenizer` names `name`. Corpora without such a file are taken as they
    are."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        made_with: Any = json.loads(path.read_bytes())["tokenizer"]
        other, fingerprint = made_with["name"], made_with["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is not the summary that tools/preprocess_data.py writes beside a corpus "
            f"({type(error).__name__}: {error}); preprocess the text again, or move this file away "
            "if it has nothing to do with the corpus"
        ) from error
    if fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{path}: the corpus was made with the tokenizer {other} (fingerprint "
            f"{fingerprint}), and data.tokenizer = {name} has fingerprint "
            f"{tokenizer.fingerprint}; name that tokenizer, or preprocess the text with this one"
        )
