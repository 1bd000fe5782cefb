"""Fixtures and settings of the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version

import pytest
from hypothesis import settings

from tests.certificate import Certifier
from tests.device import chosen_device, use_chosen_device
from tests.harness import Ranks

# Examples that start collectives take as long as the machine is busy.
settings.register_profile("uoe", deadline=None, print_blob=True)
settings.load_profile("uoe")


def pytest_configure(config: pytest.Config) -> None:
    if told := use_chosen_device():
        raise pytest.UsageError(told)
    config.pluginmanager.register(Certifier())
    # Ignored where a script runs the suite in the background, and then by all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    names = ("torch", "megatron-core", "deepspeed")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{versions}, on {chosen_device()}"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """`ranks(world_size).run(function, *args)` runs a function on every rank of a world."""
    with closing(Ranks(tmp_path_factory.mktemp("ranks"))) as started:
        yield started


@pytest.fixture(autouse=True)
def _launchers_variables_are_left_alone() -> Iterator[None]:
    """A process that a later test starts would take itself for a rank of a launch."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    before = names & os.environ.keys()
    yield
    assert names & os.environ.keys() == before
