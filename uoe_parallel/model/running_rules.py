"""The routing rules of a model that move between optimizer steps, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from uoe_parallel.routing.router import Router
from uoe_parallel.routing.running import Running


class Routes(Protocol):
    """A routed block, or as much of it as its rules."""

    @property
    def router(self) -> Router: ...


def named_rules(blocks: Mapping[str, Routes]) -> Iterator[tuple[str, Running]]:
    """Every rule of these blocks by "<block>/<level>/<rule>"."""
    for name, block in blocks.items():
        for weight, level in block.router.levels.items():
            level_name = weight.removesuffix("router_weight") + "router"
            for rule in level.running:
                yield f"{name}/{level_name}/{type(rule).__name__}", rule


def rule_states(blocks: Mapping[str, Routes]) -> Iterator[tuple[str, Tensor]]:
    """Every rule's state by the names of checkpoints, "<block>/<level>/<rule>/<name>"."""
    for prefix, rule in named_rules(blocks):
        for name, value in rule.state.items():
            yield f"{prefix}/{name}", value
