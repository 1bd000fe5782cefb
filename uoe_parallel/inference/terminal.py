"""What a terminal is shown."""

from __future__ import annotations

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def harmless(text: str) -> str:
    """`text` without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else _REPLACEMENT for c in text)
