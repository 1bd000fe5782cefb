"""From a checkpoint into the routing rules of a model, which need neither groups nor layers."""

from __future__ import annotations

from collections.abc import Mapping

from uoe_parallel.checkpoint import CheckpointReader
from uoe_parallel.model.running_rules import Routes, named_rules


def restore_rules(blocks: Mapping[str, Routes], reader: CheckpointReader) -> None:
    """Load the state of routing rules. A rule that the saved run did not have starts afresh.

    Not collective. Raises OSError if a file has gone since it was found whole.
    """
    saved = reader.keys()
    for prefix, rule in named_rules(blocks):
        if all(f"{prefix}/{name}" in saved for name in rule.state):
            rule.state = {name: reader.read(f"{prefix}/{name}") for name in rule.state}
