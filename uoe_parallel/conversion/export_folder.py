"""The folder of a model as transformers reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from uoe_parallel.conversion.export_source import Source
from uoe_parallel.conversion.export_tokenizer import write_tokenizer
from uoe_parallel.errors import UserError

SHARD_BYTES = 5 * 10**9
"""Of a file at most; a tensor that is larger has one of its own."""


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor that is read when it is written, so that no more than a file is held at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Exported:
    """What was written."""

    step: int
    """Optimizer steps that the model has seen."""
    elements: int
    """Of all tensors."""
    bytes: int
    files: int
    has_tokenizer: bool
    """Whether AutoTokenizer finds one."""


def write_model(
    out: Path,
    source: Source,
    config: Mapping[str, Any],
    tensors: Sequence[ExportedTensor],
    code: Sequence[Path] = (),
) -> Exported:
    """Write the new folder `out`: `tensors`, config.json of `config` and what all models have in
    common, the tokenizer, and copies of the files in `code`. Raises UserError."""
    with _new_folder(out) as folder:
        eod, dtype = source.tokenizer.eod, str(source.dtype).removeprefix("torch.")
        ends = {"bos_token_id": None, "eos_token_id": eod}  # nothing is put before a text
        _write_json(folder / "config.json", {**config, **ends, "torch_dtype": dtype})
        # Not in config.json: a model of transformers does not train the embedding of padding.
        _write_json(folder / "generation_config.json", {**ends, "pad_token_id": eod})
        for file in code:
            shutil.copyfile(file, folder / file.name)
        name, context = source.config.data.tokenizer, source.config.model.sequence_length
        has_tokenizer = write_tokenizer(folder, name, eod=eod, context=context)
        files = _write_weights(folder, tensors)
    return Exported(
        step=source.reader.step,
        elements=sum(prod(tensor.shape) for tensor in tensors),
        bytes=sum(tensor.bytes for tensor in tensors),
        files=files,
        has_tokenizer=has_tokenizer,
    )


def _write_weights(folder: Path, tensors: Sequence[ExportedTensor]) -> int:
    """Returns how many files they fill."""
    shards = list(_cut(tensors))
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    else:
        pairs = zip(names, shards, strict=True)
        places = {tensor.name: name for name, shard in pairs for tensor in shard}
        total = {"total_size": sum(tensor.bytes for tensor in tensors)}
        index = {"metadata": total, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    for name, shard in zip(names, shards, strict=True):
        values = {tensor.name: _read(tensor) for tensor in shard}
        save_file(values, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors lets nobody but the owner read
    return count


def _cut(tensors: Sequence[ExportedTensor]) -> Iterator[list[ExportedTensor]]:
    shard: list[ExportedTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.bytes
    yield shard


def _read(tensor: ExportedTensor) -> Tensor:
    value = tensor.read().contiguous()
    assert tuple(value.shape) == tensor.shape and value.dtype == tensor.dtype, tensor.name
    return value


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` when the block ends, and goes if it fails.

    Raises UserError if there is something at `out`, or if it can't be written.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already; name a new folder for the model")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except OSError as error:
        raise UserError(
            f"{out}: the model can't be written ({error.strerror or error}); see that its folder "
            "can be written to and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
