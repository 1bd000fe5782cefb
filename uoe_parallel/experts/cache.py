"""What attention keeps of earlier tokens when text is decoded one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """The rotated keys and the values of one attention block, run after run.

    A run is an (expert of this rank, sequence), expert-major: every head keeps only what it may
    attend to, so runs are of different length. Each sequence holds one document. Buffers grow by
    doubling; their memory is that of the longest run, for each of the runs.
    """

    def __init__(self) -> None:
        self.lengths_G = torch.zeros(0, dtype=torch.int64)
        """Tokens kept for each run, int64."""
        self._kept: Tensor | None = None  # [2, G, capacity, d], keys and then values
        self._longest = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever appended, be it for no token."""
        return self._kept is None

    @torch.no_grad()
    def append(self, k_Md: Tensor, v_Md: Tensor, lengths_G: Tensor) -> None:
        """Add `lengths_G` (int64) rows to each run: those of the first run first, by position."""
        # Zeros where nothing is kept: a value that is hidden by a weight of zero must be finite.
        if self._kept is None:
            self.lengths_G = torch.zeros_like(lengths_G)
            self._kept = k_Md.new_zeros(2, len(lengths_G), 1, k_Md.shape[1])
        run_M = torch.repeat_interleave(lengths_G, output_size=len(k_Md))
        first_G = lengths_G.cumsum(0) - lengths_G
        within_M = torch.arange(len(k_Md), device=run_M.device) - first_G[run_M]
        place_M = self.lengths_G[run_M] + within_M
        self.lengths_G = self.lengths_G + lengths_G
        self._longest = int(self.lengths_G.max())
        _, runs, capacity, width = self._kept.shape
        if self._longest > capacity:
            grown = k_Md.new_zeros(2, runs, max(self._longest, 2 * capacity), width)
            grown[:, :, :capacity] = self._kept
            self._kept = grown
        self._kept[:, run_M, place_M] = torch.stack((k_Md, v_Md))

    def read(self, run_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of some runs, [N, L, d] each, and how many of the L are theirs, [N]."""
        assert self._kept is not None
        kept = self._kept[:, :, : max(1, self._longest)]
        if len(run_N) < len(self.lengths_G):  # otherwise it is all of them: no copy
            kept = kept[:, run_N]
        return kept[0], kept[1], self.lengths_G[run_N]
