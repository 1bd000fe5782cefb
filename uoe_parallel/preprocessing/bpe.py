"""Byte-pair encoding over bytes, learned from text: none is unknown to it, and all come back.

Sennrich et al., arXiv 1508.07909; over bytes as in GPT-2 (Radford et al., 2019).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from uoe_parallel.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""Ids that are there before anything is learned: one for each byte and the end of a document."""


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """A byte-level BPE with at most `vocab_size` ids, the first of which ends documents.

    It depends on the texts alone and not on their order or the number of threads. Pairs that occur
    fewer than `min_frequency` times are not merged, so that little text gives fewer ids. Texts are
    cut into words as GPT-2 does it; what is kept in memory is every different word and its count.
    """
    assert vocab_size >= SMALLEST_VOCABULARY
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_new(tokenizer: Tokenizer, path: Path) -> None:
    """Write a file that must not be there yet, whole or not at all.

    Raises UserError if it is there: corpora and checkpoints may have been made with it.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole = Path(folder, path.name)
        tokenizer.save(str(whole))
        try:
            # Unlike a rename, this does not replace what came in the meantime.
            os.link(whole, path)
        except FileExistsError:
            refuse_existing(path)


def refuse_existing(path: Path) -> None:
    """Raises UserError if there is something at `path`."""
    if path.exists():
        raise UserError(
            f"{path}: is there already, and corpora and checkpoints may have been made with it; "
            "name another file or remove it"
        )
