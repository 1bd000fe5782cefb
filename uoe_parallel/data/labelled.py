"""Documents with a class each: a megatron .bin/.idx pair and a file of labels beside it."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from numpy.random import BitGenerator
from numpy.typing import NDArray

from uoe_parallel.data.batches import MicroBatch
from uoe_parallel.data.draws import Draws
from uoe_parallel.data.token_pair import WHOLE, Share, TokenPair
from uoe_parallel.errors import UserError


def labels_path(prefix: str | Path) -> Path:
    """Where the labels of the pair at `prefix` are: int64 [documents], as numpy.save writes it."""
    return Path(f"{prefix}.labels.npy")


class LabelledDocuments:
    """The documents of a share of a pair, each a sequence of its own, and their classes.

    Memory holds 16 bytes for each document of the pair, its place and its label.

    Raises UserError when a file is missing or damaged, when there is not one label for each
    document or one is not in [0, num_classes), or when a document is empty or longer than
    `sequence_length`, or the share has none.
    """

    def __init__(
        self, prefix: str | Path, sequence_length: int, num_classes: int, share: Share = WHOLE
    ) -> None:
        self.prefix = str(prefix)
        self.sequence_length = sequence_length
        self._pair = TokenPair(prefix, least="one document")
        documents = self._pair.documents_of(share)
        if len(documents) == 0:
            raise UserError(
                f"{self._pair.bin_path}: of its {self._pair.num_documents} documents, one part of "
                "data.split gets none; use a larger corpus or other parts"
            )
        self._first = documents.start
        self._bounds = self._pair.bounds(documents)
        """Where documents begin, and the last one ends, in tokens: int64 [documents + 1]."""
        self._labels = _read_labels(labels_path(self.prefix))
        self._check_lengths()
        self._check_labels(num_classes)
        self._labels = self._labels[documents.start : documents.stop]
        self.draws = Draws([len(self)])

    @property
    def fingerprint(self) -> list[int]:
        """The number of tokens, and checksums of the first document and of all labels."""
        start, end = self._bounds[:2].tolist()
        first = self._pair.read(start, end - start)
        checksums = (zlib.crc32(array.tobytes()) for array in (first, self._labels))
        return [int(self._bounds[-1]) - start, *checksums]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def micro_batch(
        self, numbers: Sequence[int], streams: Sequence[BitGenerator], size: int
    ) -> MicroBatch:
        tokens = torch.zeros(size, self.sequence_length, dtype=torch.int64)
        documents = torch.full_like(tokens, -1)
        labels = torch.zeros(size, 1, dtype=torch.int64)
        for row, number in enumerate(numbers):
            first, end = self._bounds[number : number + 2].tolist()
            tokens[row, : end - first] = torch.from_numpy(self._pair.read(first, end - first))
            documents[row, : end - first] = 0
            labels[row] = int(self._labels[number])
        counts = (torch.arange(size) < len(numbers)).unsqueeze(1)
        return MicroBatch(tokens, labels, counts, documents)

    def _check_lengths(self) -> None:
        lengths = np.diff(self._bounds)
        shortest, longest_one = self._first + lengths.argmin(), self._first + lengths.argmax()
        if lengths.min() == 0:
            raise UserError(
                f"{get_bin_path(self.prefix)}: document {shortest} (from 0) is empty, and "
                "there is nothing to classify; leave it out, with its label"
            )
        if (longest := int(lengths.max())) > self.sequence_length:
            raise UserError(
                f"{get_bin_path(self.prefix)}: document {longest_one} (from 0) has {longest} "
                f"tokens, more than model.sequence_length = {self.sequence_length}; shorten the "
                f"documents or set model.sequence_length to {longest} or more"
            )

    def _check_labels(self, num_classes: int) -> None:
        path, labels = labels_path(self.prefix), self._labels
        if len(labels) != (count := self._pair.num_documents):
            raise UserError(
                f"{path}: has {len(labels)} labels for {count} documents; give each document "
                "of the pair one label, in the same order"
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(wrong) > 0:
            raise UserError(
                f"{path}: label {labels[wrong[0]]} of document {wrong[0]} (from 0) is not one of "
                f"the model.num_classes = {num_classes} classes, which are counted from 0; correct "
                "the labels or model.num_classes"
            )


class LabelledWriter:
    """Writes a pair and its labels, a document at a time, as `LabelledDocuments` reads them."""

    def __init__(self, prefix: str | Path) -> None:
        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.int32)
        self._labels = array("q")

    def add(self, ids: NDArray[np.integer], label: int) -> None:
        """ids: int32 [n], kept as they are: no end of document is added."""
        self._builder.add_item(torch.from_numpy(ids))
        self._builder.end_document()
        self._labels.append(label)

    def finish(self) -> None:
        self._builder.finalize(get_idx_path(str(self._prefix)))
        np.save(labels_path(self._prefix), np.asarray(self._labels, dtype=np.int64))


def write_labelled_documents(
    prefix: str | Path, documents: Iterable[NDArray[np.integer]], labels: Sequence[int]
) -> None:
    """Write `documents`, int32 ids [n] each, and their labels, as `LabelledWriter` does."""
    writer = LabelledWriter(prefix)
    for ids, label in zip(documents, labels, strict=True):
        writer.add(ids, label)
    writer.finish()


def _read_labels(path: Path) -> NDArray[np.int64]:
    mend = "write the class of each document there, int64 [documents], with numpy.save"
    if not path.is_file():
        raise UserError(f"{path}: no such file, and model.task = classification needs it; {mend}")
    try:
        labels = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); {mend}") from error
    if not isinstance(labels, np.ndarray):
        raise UserError(f"{path}: is an archive of arrays; {mend}")
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise UserError(f"{path}: has {labels.dtype} {list(labels.shape)}; {mend}")
    return labels
