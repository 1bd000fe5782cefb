"""Two hosts on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.hosts import SCRIPT, namespaces, needs_namespaces


def _start(*arguments: str) -> subprocess.CompletedProcess[str]:
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "TORCHRUN": torchrun},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@needs_namespaces
@pytest.mark.slow
def test_ranks_of_two_hosts_meet_over_the_link(tmp_path: Path) -> None:
    before = namespaces()
    ended = _start("--rate", "100mbit", "--ranks", "1", "-m", "tests.launch.meeting", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    met = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert [words[:2] for words in met] == [["0", "2"], ["1", "2"]]
    for _, _, *interfaces in met:
        # Nothing of the machine's own network is there.
        assert [name.rstrip("0123456789") for name in interfaces] == ["eth", "lo"]
    assert namespaces() == before


@needs_namespaces
def test_failure_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    before = namespaces()
    ended = _start("--ranks", "1", "-m", "tests.launch.meeting", str(tmp_path / "missing"))
    assert ended.returncode != 0
    assert "FileNotFoundError" in ended.stderr
    assert namespaces() == before


def test_what_is_needed_is_said(tmp_path: Path) -> None:
    """To who has no iproute2, whoever they are."""
    for program in ("bash", "dirname", "env"):
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    ended = subprocess.run(
        ["bash", str(SCRIPT), "-m", "tests.launch.meeting"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "simulated hosts need root and the programs ip and tc (Debian: iproute2)\n"
    )
