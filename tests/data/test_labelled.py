"""Documents with a class each, and every way in which they can be unfit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from uoe_parallel.data.batches import random_stream
from uoe_parallel.data.labelled import LabelledDocuments, labels_path, write_labelled_documents
from uoe_parallel.data.token_pair import Share
from uoe_parallel.errors import UserError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8], [70000]]
LABELS = [2, 0, 1, 1]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, labels: list[int] = LABELS) -> Path:
    write_labelled_documents(prefix, [np.array(ids, dtype=np.int64) for ids in documents], labels)
    return prefix


def test_documents_are_padded_and_carry_their_classes(tmp_path: Path) -> None:
    examples = LabelledDocuments(write(tmp_path / "data"), sequence_length=4, num_classes=3)
    assert len(examples) == 4
    batch = examples.micro_batch([2, 0, 3], [random_stream(0)] * 3, 4)
    assert batch.documents is not None
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [1, 2, 3, 0], [70000, 0, 0, 0], [0] * 4]
    assert batch.documents.tolist() == [[0] * 4, [0, 0, 0, -1], [0, -1, -1, -1], [-1] * 4]
    assert batch.labels.tolist() == [[1], [2], [1], [0]]
    assert batch.loss_mask.tolist() == [[True], [True], [True], [False]]
    assert (batch.tokens.dtype, batch.loss_mask.dtype) == (torch.int64, torch.bool)


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(7, 9), [2])
    builder.finalize(str(tmp_path / "data.idx"))
    np.save(labels_path(tmp_path / "data"), np.array([0, 1]))
    batch = LabelledDocuments(tmp_path / "data", 5, 2).micro_batch([0, 1], [], 2)
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4], [7, 8, 0, 0, 0]]


def test_fingerprint_tells_texts_and_labels_apart(tmp_path: Path) -> None:
    variants = [(DOCUMENTS, LABELS), ([[1, 2, 9], *DOCUMENTS[1:]], LABELS), (DOCUMENTS, [0] * 4)]
    prints = [
        LabelledDocuments(write(tmp_path / str(n), *variant), 4, 3).fingerprint
        for n, variant in enumerate(variants)
    ]
    assert len({tuple(p) for p in prints}) == 3
    again = LabelledDocuments(write(tmp_path / "again"), 4, 3).fingerprint
    assert again == prints[0]


def test_a_share_has_its_documents_with_their_labels(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    first, rest = (LabelledDocuments(prefix, 4, 3, Share(*s)) for s in ((0, 0.3), (0.3, 1)))
    assert (len(first), len(rest)) == (1, 3)
    batch = rest.micro_batch([0, 1], [], 2)
    assert batch.tokens.tolist() == [[4, 0, 0, 0], [5, 6, 7, 8]]
    assert batch.labels.tolist() == [[0], [1]]
    assert first.fingerprint != rest.fingerprint
    with pytest.raises(UserError, match=r"of its 4 documents, one part of data\.split gets none"):
        LabelledDocuments(prefix, 4, 3, Share(0.95, 0.96))


def labels(values: object) -> Callable[[Path], None]:
    return lambda prefix: np.save(labels_path(prefix), np.array(values), allow_pickle=True)


def archive(prefix: Path) -> None:
    with labels_path(prefix).open("wb") as file:
        np.savez(file, labels=np.array(LABELS))


@pytest.mark.parametrize(
    ("spoil", "file", "says"),
    [
        (lambda prefix: labels_path(prefix).unlink(), "data.labels.npy", "no such file"),
        (labels(LABELS[:3]), "data.labels.npy", "has 3 labels for 4 documents"),
        (labels([0, 1, 3, 1]), "data.labels.npy", "label 3 of document 2 "),
        (labels([0, -1, 1, 1]), "data.labels.npy", "label -1 of document 1 "),
        (labels([0.0, 1.0, 1.0, 1.0]), "data.labels.npy", "has float64 [4]"),
        (labels([[0, 1], [1, 1]]), "data.labels.npy", "has int64 [2, 2]"),
        (labels([None, 1, 1, 1]), "data.labels.npy", "cannot be read"),
        (archive, "data.labels.npy", "archive"),
        (lambda prefix: labels_path(prefix).write_bytes(b""), "data.labels.npy", "cannot be read"),
        (lambda prefix: labels_path(prefix).write_text("0 1"), "data.labels.npy", "cannot be read"),
        (lambda prefix: labels_path(prefix).write_bytes(b"PK\x03\x04"), "data.labels.npy", "read"),
        (lambda prefix: write(prefix, [[1] * 5, [1]], [0, 1]), "data.bin", "document 0 "),
        (lambda prefix: write(prefix, [[1], [], [2]], [0, 1, 0]), "data.bin", "document 1 "),
        (lambda prefix: write(prefix, [], []), "data.bin", "the corpus is empty"),
        (lambda prefix: prefix.with_suffix(".idx").unlink(), "data.idx", "no such file"),
    ],
)
def test_unfit_data_is_named_with_file_and_mend(
    spoil: Callable[[Path], None], file: str, says: str, tmp_path: Path
) -> None:
    prefix = write(tmp_path / "data")
    LabelledDocuments(prefix, 4, 3)
    spoil(prefix)
    with pytest.raises(UserError) as caught:
        LabelledDocuments(prefix, 4, 3)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / file}: ")
    assert says in message and ";" in message


def test_too_long_a_document_names_the_length_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.sequence_length = 3; .* to 4 or more"):
        LabelledDocuments(write(tmp_path / "data"), 3, 3)
