"""Windows of tokens over a .bin/.idx pair.

Megatron's own GPTDataset is not used: it fixes the order of samples for a given number of them,
so that a longer run sees another order; it cuts its windows after shuffling the documents, so
that validation windows change with the seed; and its caches load with pickling allowed. Here a
window's number alone says what is in it, and the order is `uoe_parallel.data.draws`' matter.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uoe_parallel.data.token_pair import WHOLE, Share, TokenPair
from uoe_parallel.errors import UserError

_SPLIT = "in the whole documents of one part of data.split "
_OTHER_SPLIT = ", or other parts in data.split"


class TokenWindows:
    """Memory-mapped windows of `sequence_length` + 1 tokens, over document boundaries.

    The documents of a share of the corpus are one stream of tokens in the order of the .bin file.
    Window i starts at token i * sequence_length and shares its last token with the start of the
    next one: that token is the last label here and the first input there. Tokens after the last
    whole window are never drawn.

    Raises UserError as `TokenPair` does, or when there are too few tokens for one window.
    """

    def __init__(self, prefix: str | Path, sequence_length: int, share: Share = WHOLE) -> None:
        assert sequence_length > 0
        self.prefix = str(prefix)
        self.sequence_length = sequence_length
        self._pair = TokenPair(prefix, least=f"{sequence_length + 1} tokens of text")
        documents = self._pair.documents_of(share)
        self._first, end = (
            int(self._pair.bounds(range(document, document))[0])
            for document in (documents.start, documents.stop)
        )
        self.num_tokens = end - self._first
        if len(self) < 1:
            split, mend = ("", "") if share == WHOLE else (_SPLIT, _OTHER_SPLIT)
            raise UserError(
                f"{self._pair.bin_path}: {self.num_tokens} tokens {split}are fewer than one "
                f"window of model.sequence_length + 1 = {sequence_length + 1}; use a larger "
                f"corpus or a smaller model.sequence_length{mend}"
            )

    @property
    def fingerprint(self) -> list[int]:
        """The number of tokens and the first window's checksum."""
        return [self.num_tokens, zlib.crc32(self[0].tobytes())]

    def __len__(self) -> int:
        return max(self.num_tokens - 1, 0) // self.sequence_length

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """Window `number` (from 0): int64 [sequence_length + 1], a copy."""
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        first = self._first + number * self.sequence_length
        return self._pair.read(first, self.sequence_length + 1)
