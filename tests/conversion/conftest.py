"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conversion.hugging_face import transformers


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that comes with a model is copied to `tmp_path` and imported from there."""
    for module in (transformers().utils.hub, transformers().dynamic_module_utils):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small only wait for more of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
