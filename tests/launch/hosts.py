"""Two simulated hosts, as tests start them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.programs import CHECKOUT, MPIRUN_ANYWHERE

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


def environment(**variables: str) -> Mapping[str, str]:
    """In which scripts find this Python and what is installed beside it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **MPIRUN_ANYWHERE, "PATH": path, "OMP_NUM_THREADS": "1", **variables}


@contextmanager
def started(
    *command: str | Path, output: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`command`, which writes to `output` and is told to end if the block leaves it running."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment(**(variables or {})),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)


@contextmanager
def two_hosts(
    launcher: str, *arguments: str | Path, output: Path, rate: str = "200mbit"
) -> Iterator[subprocess.Popen[bytes]]:
    """A run with one rank on each of two hosts. They go with the block."""
    hosts = ("bash", SCRIPT, "--rate", rate, "--ranks", "1", "--program", ON_HOST)
    with started(*hosts, launcher, *arguments, output=output) as process:
        yield process
    assert not namespaces() & set(host_names(process))


def host_names(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """The namespaces that a running simulated_hosts.sh has made, or will make."""
    return f"uoe{process.pid}a", f"uoe{process.pid}b"
