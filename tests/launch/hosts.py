"""Two simulated hosts, as tests start them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.starting import Process, started
from tests.programs import CHECKOUT

SCRIPT = CHECKOUT / "launch" / "simulated_hosts.sh"
ON_HOST = CHECKOUT / "tests" / "launch" / "on_host.sh"


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}


def _can_make_namespaces() -> bool:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        return False
    name = f"uoe-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made.returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _can_make_namespaces(), reason="needs root, iproute2 and the right to make namespaces"
)


@contextmanager
def two_hosts(
    launcher: str, *arguments: str | Path, output: Path, rate: str = "200mbit"
) -> Iterator[Process]:
    """A run with one rank on each of two hosts. They go with the block."""
    hosts = ("bash", SCRIPT, "--rate", rate, "--ranks", "1", "--program", ON_HOST)
    with started(*hosts, launcher, *arguments, output=output) as process:
        yield process
    assert not namespaces() & set(host_names(process))


def host_names(process: Process) -> tuple[str, str]:
    """The namespaces that a running simulated_hosts.sh has made, or will make."""
    return f"uoe{process.pid}a", f"uoe{process.pid}b"
