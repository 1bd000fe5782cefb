"""What has to be the same on all ranks before they work together: their config and their code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

import uoe_parallel
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.agreement import first_difference


def check_same(config: RunConfig, group: ProcessGroup | None) -> None:
    """Collective. Raises UserError on every rank, with the first difference and the ranks, if not
    all of them have this config and this code."""
    if difference := first_difference(config_fields(config), group):
        raise UserError(
            f"ranks have different configs: {difference}. Start all of them with the same file "
            "and the same overrides"
        )
    if difference := first_difference(source_digests(), group):
        raise UserError(
            f"ranks run different code: the checksum of {difference}. Install the same version "
            "on every node"
        )


def config_fields(config: RunConfig) -> dict[str, Any]:
    """Every field by its full name, such as "training.steps"; values as JSON."""
    return dict(_leaves(config.model_dump(mode="json"), ()))


def source_digests() -> dict[str, str]:
    """Checksums of this package's source files, by path: the first digits of their SHA-256."""
    root = Path(uoe_parallel.__file__).parent
    return {
        path.relative_to(root.parent).as_posix(): _digest(path)
        for path in sorted(root.rglob("*.py"))
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield ".".join((*path, name)), value
