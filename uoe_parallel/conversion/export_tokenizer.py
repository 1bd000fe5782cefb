"""A tokenizer in the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_END = "<|endoftext|>"
"""Of a tokenizer that has no text for the id that ends documents."""


def write_tokenizer(folder: Path, name: str, *, eod: int, context: int) -> bool:
    """Write the tokenizer that `data.tokenizer` names, with the id that ends documents as its end
    of text; returns whether AutoTokenizer finds it: a SentencePiece model is copied, and needs a
    class that the user knows. context: in tokens. Raises OSError."""
    if name.endswith(".model"):
        shutil.copyfile(name, folder / "tokenizer.model")
        return False
    tokenizer = _of_bytes() if name == "bytes" else Tokenizer.from_file(name)
    if tokenizer.id_to_token(eod) is None:
        tokenizer.add_special_tokens([_END])
    end = tokenizer.id_to_token(eod)
    assert end is not None, f"{name} has no id {eod}"
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return True


def _of_bytes() -> Tokenizer:
    """A token for every byte, with its value as the id."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> list[str]:
    """What stands for each byte in byte-level vocabularies (GPT-2's): its own character where that
    can be seen, and the next free one from U+0100 on where it can't."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(free)) for byte in range(256)]
