"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.conversion.hugging_face import transformers


@pytest.fixture(scope="session")
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that comes with a model is copied to one folder of this session, which Python does not
    forget once it has imported something from there."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (transformers().utils.hub, transformers().dynamic_module_utils):
            patch.setattr(module, "HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small only wait for more of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
