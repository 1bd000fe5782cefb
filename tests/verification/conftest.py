"""Settings of these tests."""

from __future__ import annotations

import pytest

from tests.harness import Ranks


@pytest.fixture(autouse=True)
def _server(ranks: Ranks) -> None:
    """The process that ranks are forked from is the session's, which has one alone."""
