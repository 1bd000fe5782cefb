"""Tokenizers as transformers finds them beside a model."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from tests.conversion.hugging_face import transformers
from uoe_parallel.conversion.export_tokenizer import write_tokenizer
from uoe_parallel.data.tokenizer import ByteTokenizer, build_tokenizer

TEXT = "Ein Text,\n\tmit \x00 und «Größe» 漢字 🙂 <|endoftext"


def test_bytes(tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path, "bytes", eod=ByteTokenizer.eod, context=77)
    tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXT).input_ids == ByteTokenizer().encode(TEXT).tolist()
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert len(tokenizer) == ByteTokenizer.size
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ByteTokenizer.eod
    assert tokenizer.model_max_length == 77


def test_a_file_that_does_not_end_texts_gets_the_id_that_does(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    words = Tokenizer(models.WordLevel({"the": 0, "bee": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(file))
    ours = build_tokenizer(str(file))
    (tmp_path / "out").mkdir()
    assert write_tokenizer(tmp_path / "out", str(file), eod=ours.eod, context=8)
    tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the bee sees").input_ids == ours.encode("the bee sees").tolist()
    assert tokenizer.eos_token_id == ours.eod == 3
    assert len(tokenizer) == ours.size


def test_a_sentencepiece_model_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "spm.model"
    file.write_bytes(b"pieces")
    assert not write_tokenizer(tmp_path, str(file), eod=2, context=8)
    assert (tmp_path / "tokenizer.model").read_bytes() == b"pieces"
    assert not (tmp_path / "tokenizer_config.json").exists()
