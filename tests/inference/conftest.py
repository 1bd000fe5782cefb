"""A trained run that the tests of programs share."""

from __future__ import annotations

import pytest

from tests.harness import Ranks
from tests.inference.cases import train


@pytest.fixture(scope="session")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of one that was trained on two ranks."""
    folder = tmp_path_factory.mktemp("inference")
    return ranks(2).run(train, folder, parallel={"tensor": 2})[0]
