"""How large a measured layer is, and what passes through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from uoe_parallel.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """Of one layer and what passes through it."""

    tokens: int = 4096
    """Of all ranks together."""
    sequence: int = 512
    """Tokens of a sequence, a divisor of `tokens`."""
    hidden: int = 512
    ffn: int = 2048
    experts: int = 16
    top_k: int = 2
    heads: int = 8

    @property
    def batch(self) -> int:
        return self.tokens // self.sequence

    @property
    def expert_ffn(self) -> int:
        """Feed-forward width of one expert."""
        return self.ffn // self.experts

    @property
    def active_ffn(self) -> int:
        """Feed-forward width that a token passes through."""
        return self.ffn * self.top_k // self.experts


def check_sizes(sizes: Sizes, ranks: int) -> None:
    """Raises UserError for what can't be cut over `ranks` ranks."""
    if fault := next(_faults(sizes, ranks), None):
        raise UserError(fault)


def _faults(sizes: Sizes, ranks: int) -> Iterator[str]:
    multiples = [
        ("--tokens", sizes.tokens, sizes.sequence, "the length of a sequence"),
        ("--sequence", sizes.sequence, ranks, "the number of ranks"),
        ("--experts", sizes.experts, ranks, "the number of ranks"),
        ("--ffn", sizes.ffn, sizes.experts, "the number of experts"),
        ("--hidden", sizes.hidden, 2 * sizes.heads, f"twice the {sizes.heads} attention heads"),
    ]
    for option, value, divisor, what in multiples:
        if value % divisor:
            yield f"{option} {value}: give a multiple of {divisor}, {what}"
    if sizes.top_k > sizes.experts:
        yield f"--top-k {sizes.top_k}: give at most {sizes.experts}, the number of experts"
    if sizes.active_ffn % ranks:
        yield (
            f"--top-k {sizes.top_k}: its experts are {sizes.active_ffn} wide together, which "
            f"{ranks} ranks can't share; change --top-k, --ffn or --experts"
        )
