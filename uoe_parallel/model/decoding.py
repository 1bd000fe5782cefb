"""What a stage remembers of a text, so that each further token costs no more than itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from uoe_parallel.experts.cache import KeyValueCache
from uoe_parallel.routing.level import Level
from uoe_parallel.routing.memory import LevelMemory


@dataclass
class BlockMemory:
    """Of one block."""

    cache: KeyValueCache = field(default_factory=KeyValueCache)
    """Used by attention alone."""
    levels: dict[Level, LevelMemory] = field(default_factory=dict)


class DecodingMemory:
    """Of B texts, one document each, that grow by a token at a time.

    Pass a new one with the beginnings of the texts, then with one token of each after the other:
    `LanguageModel.hidden` fills it and goes on from it.
    """

    def __init__(self) -> None:
        self.position_B: Tensor | None = None
        """int64: tokens so far, which is the place of the next one."""
        self._blocks: dict[nn.Module, BlockMemory] = {}

    @property
    def is_empty(self) -> bool:
        return self.position_B is None

    def of(self, block: nn.Module) -> BlockMemory:
        return self._blocks.setdefault(block, BlockMemory())
