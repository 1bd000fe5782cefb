"""Tokenizers from files: text comes back, whole or in pieces, and fingerprints follow content."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from uoe_parallel.data.tokenizer import Tokenizer, build_tokenizer
from uoe_parallel.errors import UserError

WORDS = ["the cat sat on the mat", "a naïve café, 5 €", "grüße aus köln 🙂🙃", "the end of the cat"]
ANY_TEXT = st.text(st.one_of(st.sampled_from("the cat é€🙂"), st.characters(codec="utf-8")))


def byte_level(path: Path, special: str | None = "<|endoftext|>") -> Path:
    """A byte-level BPE like GPT-2's."""
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[special] if special else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    tokenizer.save(str(path))
    return path


def byte_fallback(path: Path) -> Path:
    """A BPE like Llama's: words begin with U+2581, unknown characters fall back to bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"thecat"]
    vocabulary = {name: number for number, name in enumerate([*names, "▁t"])}
    model = models.BPE(vocabulary, [("▁", "t")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Library(model)
    tokenizer.add_special_tokens(names[:3])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(path))
    return path


def sentence_piece(path: Path, **options: Any) -> Path:
    """A SentencePiece model that keeps every character and space as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(WORDS * 4),
        model_writer=model,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    files = [
        byte_level(folder / "bytes.json"),
        byte_fallback(folder / "fallback.json"),
        sentence_piece(folder / "pieces.model"),
    ]
    return [build_tokenizer("bytes"), *(build_tokenizer(str(file)) for file in files)]


@given(ANY_TEXT)
def test_text_comes_back_whole_and_in_pieces(tokenizers: list[Tokenizer], text: str) -> None:
    # SentencePiece reads U+2581 as a space and 0 as an end.
    text = text.replace("▁", "").replace("\0", "")
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64 and (ids < tokenizer.size).all()
        assert tokenizer.eod not in ids
        assert ids.tolist() == tokenizer.encode(text.encode()).tolist()
        assert tokenizer.decode([*ids, tokenizer.eod]) == text
        stream = tokenizer.stream()
        pieces = [stream.add(int(token)) for token in ids]
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert "".join([*pieces, stream.end()]) == text


@given(st.lists(st.integers(0, 255), max_size=30))
def test_garbage_is_streamed_without_waiting_for_its_end(
    tokenizers: list[Tokenizer], garbage: list[int]
) -> None:
    for tokenizer in tokenizers[:2]:
        stream = tokenizer.stream()
        told = ""
        for end, token in enumerate(garbage, 1):
            told += stream.add(token)
            held = tokenizer.decode(garbage[:end])
            assert len(held.rstrip("\N{REPLACEMENT CHARACTER}")) <= len(told) + 4
        told += stream.end()
        assert [c for c in told if c.isascii()] == [
            c for c in tokenizer.decode(garbage) if c.isascii()
        ]


def test_a_stream_leaves_ends_of_documents_out(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        stream = tokenizer.stream()
        ids = [*tokenizer.encode("the"), tokenizer.eod, *tokenizer.encode("the")]
        told = "".join([*map(stream.add, map(int, ids)), stream.end()])
        assert told == tokenizer.decode(ids)


def test_ids_outside_the_vocabulary_are_refused(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        for wrong in (-1, tokenizer.size):
            with pytest.raises(ValueError, match="range"):
                tokenizer.decode([wrong])


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<|end_of_text|>"])
def test_the_end_of_text_of_the_file_ends_documents(name: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(str(byte_level(tmp_path / "t.json", name)))
    library = Library.from_file(str(tmp_path / "t.json"))
    assert tokenizer.eod == library.token_to_id(name)
    assert tokenizer.size == library.get_vocab_size()


def test_a_file_without_one_gets_the_next_id(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(str(byte_level(tmp_path / "t.json", special=None)))
    count = Library.from_file(str(tmp_path / "t.json")).get_vocab_size()
    assert (tokenizer.eod, tokenizer.size) == (count, count + 1)
    pieces = build_tokenizer(str(sentence_piece(tmp_path / "t.model", eos_id=-1)))
    assert pieces.eod == pieces.size - 1


def test_size_counts_gaps_between_ids(tmp_path: Path) -> None:
    library = Library.from_file(str(byte_level(tmp_path / "t.json")))
    tree = json.loads(library.to_str())
    tree["added_tokens"][0]["id"] = 5000
    del tree["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "t.json").write_text(json.dumps(tree))
    tokenizer = build_tokenizer(str(tmp_path / "t.json"))
    library = Library.from_file(str(tmp_path / "t.json"))
    assert tokenizer.size == max(library.get_vocab().values()) + 1
    assert tokenizer.eod == library.token_to_id("<|endoftext|>")


def test_text_that_spells_an_end_of_document_is_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(str(byte_level(tmp_path / "t.json")))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_nothing_is_added_cut_or_padded(tmp_path: Path) -> None:
    library = Library.from_file(str(byte_level(tmp_path / "t.json")))
    plain = build_tokenizer(str(tmp_path / "t.json"))
    library.add_special_tokens([AddedToken("<pad>")])
    library.enable_padding(length=64, pad_id=0)
    library.enable_truncation(4)
    library.save(str(tmp_path / "padded.json"))
    padded = build_tokenizer(str(tmp_path / "padded.json"))
    assert padded.encode(WORDS[0]).tolist() == plain.encode(WORDS[0]).tolist()


def test_fingerprints_are_of_content(tmp_path: Path) -> None:
    one = build_tokenizer(str(byte_level(tmp_path / "one.json")))
    tree = json.loads((tmp_path / "one.json").read_text())
    tree["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "same.json").write_text(json.dumps(tree, indent=7))
    tree["model"]["merges"].reverse()
    (tmp_path / "other.json").write_text(json.dumps(tree))
    assert build_tokenizer(str(tmp_path / "same.json")).fingerprint == one.fingerprint
    others = {build_tokenizer("bytes").fingerprint, one.fingerprint}
    others.add(build_tokenizer(str(tmp_path / "other.json")).fingerprint)
    pieces = sentence_piece(tmp_path / "one.model")
    (tmp_path / "copy.model").write_bytes(pieces.read_bytes())
    copy = build_tokenizer(str(tmp_path / "copy.model"))
    assert build_tokenizer(str(pieces)).fingerprint == copy.fingerprint
    others.add(copy.fingerprint)
    assert len(others) == 4


@pytest.mark.parametrize("name", ["t.json", "t.model"])
def test_files_that_are_none_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(UserError, match=rf"data\.tokenizer: .*{name} cannot be read.*correct"):
        build_tokenizer(str(path))
    path.write_text('{"model": 1}')
    with pytest.raises(UserError, match=rf"data\.tokenizer: .*{name} is not a .*name"):
        build_tokenizer(str(path))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"t\.model needs .*install uoe-parallel\[data\]"):
        build_tokenizer(str(tmp_path / "t.model"))
