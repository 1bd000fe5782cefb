"""Rank processes that stay up for a whole test session and run one case after the other."""

from tests.harness.ranks import RankError, RankFailure, RankPool, Ranks, free_port

__all__ = ["RankError", "RankFailure", "RankPool", "Ranks", "free_port"]
