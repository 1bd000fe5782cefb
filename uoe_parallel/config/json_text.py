"""Results as JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uoe_parallel.errors import UserError


def write_json(path: Path, content: Mapping[str, Any], *, option: str = "--json") -> None:
    """Raises UserError, which names the `option` that the path is from, if it can't be written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from None


def _plain(value: Any) -> Any:
    """With null for the infinities and NaN, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
