"""Reading a dense model's folder as transformers saves it: config.json and safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uoe_parallel.errors import UserError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_TOLD = 5
"""Names in a message."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class DenseSource:
    """A folder with a dense model. Tensors are read one by one, from one file or several.

    Raises UserError for what is missing or cannot be read, here and in `read`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; name the one that has {CONFIG_NAME}")
        self.config: dict[str, Any] = _read_json(folder / CONFIG_NAME)
        """What config.json says."""
        self._files = {path: _open(path) for path in self._weight_files()}
        self._holder = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118 - no mapping

    @property
    def names(self) -> Collection[str]:
        return self._holder.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._holder[name].get_slice(name).get_shape())

    def dtype(self) -> torch.dtype:
        """One that holds every tensor exactly."""
        kinds = {name: self._holder[name].get_slice(name).get_dtype() for name in self.names}
        if odd := {name: kind for name, kind in kinds.items() if kind not in _DTYPES}:
            name, kind = next(iter(odd.items()))
            raise UserError(
                f"{self.folder}: {name} is of type {kind}, not a plain floating-point tensor; save "
                "the model again without quantization"
            )
        return reduce(torch.promote_types, (_DTYPES[kind] for kind in kinds.values()))

    def read(self, name: str) -> Tensor:
        """As it is in the file, on the CPU; the file's own memory where that can be mapped."""
        try:
            return self._holder[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder}: {name} cannot be read: {error}") from error

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignores: Callable[[str], bool]) -> None:
        """Raise UserError unless the tensors are those of `shapes`, and beside them only such as
        `ignores` says mean nothing."""
        faults: list[str] = []
        if missing := shapes.keys() - self.names:
            faults.append(f"is missing {_few(missing)}")
        if beyond := [name for name in self.names if name not in shapes and not ignores(name)]:
            faults.append(f"has tensors that config.json has no place for: {_few(beyond)}")
        there = [name for name in shapes if name in self.names]
        if wrong := [
            f"{name} {list(self.shape(name))} instead of {list(shapes[name])}"
            for name in there
            if self.shape(name) != shapes[name]
        ]:
            faults.append(f"has shapes that do not go with config.json: {_few(wrong)}")
        if faults:
            raise UserError(
                f"{self.folder} {', and '.join(faults)}; it needs all of one plain model, without "
                "adapters or quantization, as save_pretrained writes it"
            )

    def _weight_files(self) -> list[Path]:
        index, single = self.folder / INDEX_NAME, self.folder / WEIGHTS_NAME
        if index.exists():
            placed = _read_json(index).get("weight_map")
            if not isinstance(placed, dict) or not placed:
                raise UserError(f"{index} has no weight_map; download or save the model again")
            names = sorted({str(name) for name in placed.values()})
            # Names, not paths: what an index says must not lead out of its folder.
            if odd := [name for name in names if Path(name).name != name]:
                raise UserError(f"{index} names {odd[0]!r}, which is not a file beside it")
            return [self.folder / name for name in names]
        if single.exists():
            return [single]
        raise UserError(
            f"{self.folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; save the model as "
            "safetensors (transformers: model.save_pretrained(folder)), other formats can carry "
            "code and are not read"
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; download or save the model again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is JSON of another kind: it has to be an object")
    return tree


def _few(names: Collection[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more
