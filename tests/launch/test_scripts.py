"""What launchers' scripts say and hand on, with programs in the launchers' place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.starting import environment, started
from tests.programs import CHECKOUT

_PROGRAM = """#!/usr/bin/env bash
# In the place of a launcher or of Python: notes what it is started with.
echo "$(basename "$0") $*" >>"$FOLDER/started"
env >"$0.environment"
[[ -z ${DS_ENV_FILE:-} ]] || cp "$DS_ENV_FILE" "$FOLDER/handed"
exit "${CODE:-0}"
"""
RUN = ("--config", "a file", "a.b=1")


def _end(
    script: str, folder: Path, *programs: str, **variables: str
) -> tuple[int, str, list[str], dict[str, str]]:
    """A script's exit code, its output, what it started, and the last one's environment."""
    for name in programs:
        (folder / name).write_text(_PROGRAM)
        (folder / name).chmod(0o755)
    variables = {"PATH": f"{folder}:{environment()['PATH']}", "FOLDER": str(folder), **variables}
    output = folder / "output"
    command = ("bash", CHECKOUT / "launch" / script, *RUN)
    with started(*command, output=output, variables=variables) as process:
        code = process.wait(20)
    if not (folder / "started").exists():
        return code, output.read_text(), [], {}
    lines = (folder / "started").read_text().splitlines()
    last = (folder / f"{lines[-1].split()[0]}.environment").read_text().splitlines()
    told = dict(line.split("=", 1) for line in last if "=" in line)
    return code, output.read_text(), lines, told


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        (
            "torchrun.sh",
            {"PET_NNODES": "2"},
            "torchrun.sh: PET_RDZV_ENDPOINT is not set: host:port",
        ),
        ("mpirun.sh", {}, "mpirun.sh: RANKS is not set: how many"),
        ("deepspeed.sh", {}, "deepspeed.sh: RANKS is not set: how many"),
        (
            "deepspeed.sh",
            {"HOSTFILE": "hosts", "NODE_RANK": "1"},
            "deepspeed.sh: MASTER_ADDR is not set: the address of the first node in hosts",
        ),
    ],
)
def test_missing_variable_is_named(
    script: str, variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    programs = ("python", "torchrun", "mpirun", "deepspeed")
    code, output, lines, _ = _end(script, tmp_path, *programs, **variables)
    assert (code, lines) == (2, [])
    assert output.startswith(message) and output.count("\n") == 1


def test_torchrun_is_not_started_with_a_config_that_is_wrong(tmp_path: Path) -> None:
    given = {"CODE": "2", "RANK": "1", "WORLD_SIZE": "2"}
    code, _, lines, told = _end("torchrun.sh", tmp_path, "python", "torchrun", **given)
    assert code == 2
    assert lines == ["python -m uoe_parallel.pretrain --print-config --config a file a.b=1"]
    # Rank 1 would not tell what is wrong.
    assert "RANK" not in told and "WORLD_SIZE" not in told


def test_torchrun_gets_what_the_operator_sets(tmp_path: Path) -> None:
    given = {
        "PET_NNODES": "2:4",
        "PET_NPROC_PER_NODE": "8",
        "PET_RDZV_ENDPOINT": "uoe-worker-0:23456",
        "INTERFACE": "eth7",
    }
    code, _, lines, told = _end("torchrun.sh", tmp_path, "python", "torchrun", **given)
    assert code == 0
    assert lines[-1] == "torchrun -m uoe_parallel.pretrain --config a file a.b=1"
    expected = {
        **given,
        "PET_RDZV_BACKEND": "c10d",
        "PET_MAX_RESTARTS": "3",
        "PET_SHUTDOWN_TIMEOUT": "300",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "eth7",
    }
    assert expected.items() <= told.items() and "PET_STANDALONE" not in told


def test_deepspeed_hands_the_interface_to_other_nodes(tmp_path: Path) -> None:
    given = {"HOSTFILE": "hosts", "INTERFACE": "eth7", "OMP_NUM_THREADS": "4"}
    code, _, [line], told = _end("deepspeed.sh", tmp_path, "deepspeed", **given)
    assert code == 0
    assert "--hostfile hosts --module uoe_parallel.pretrain --config a file" in line
    handed = (tmp_path / "handed").read_text().split()
    assert sorted(handed) == ["GLOO_SOCKET_IFNAME=eth7", "OMP_NUM_THREADS=4"]
    assert not Path(told["DS_ENV_FILE"]).exists()
