"""Each launcher's script: on two hosts with a link between them, and told to leave."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.harness import Ranks, free_port
from tests.launch.hosts import host_names, needs_namespaces, two_hosts
from tests.launch.starting import has_taken, started, wait_until
from tests.programs import CHECKOUT, call_program, metrics, write_run

STEPS = 8
pytestmark = pytest.mark.timeout(300)  # whole launches, twice where a rank is killed


def _run(folder: Path, steps: int = STEPS, save_every: int = 0) -> Path:
    return write_run(
        folder,
        model={"task": "masked_token"},  # of which nothing is sampled
        parallel={"tensor": 2, "zero_stage": 1},
        training={"steps": steps},
        checkpoint={"every": save_every},
    )


@pytest.fixture(scope="module")
def expected(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    [outcome] = ranks(1).run(call_program, "--config", _run(folder), "parallel.tensor=1")
    assert outcome.code == 0, outcome.err
    return _losses(folder / "run")


def _losses(run_dir: Path) -> list[float]:
    records = metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


def _rank_on(host: str) -> int:
    """The process id of the only rank that runs on a simulated host."""
    listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, check=True)
    for pid in map(int, listed.stdout.split()):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        is_rank = any(
            word.startswith((b"LOCAL_RANK=", b"OMPI_COMM_WORLD_RANK=")) for word in environment
        )
        if is_rank and b"uoe_parallel.pretrain" in command:
            return pid
    raise AssertionError(f"no rank runs on {host}")


@needs_namespaces
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("mpirun", "deepspeed", "deepspeed-by-ssh")
    ],
)
def test_two_hosts_train_as_one_process(
    launcher: str, expected: list[float], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with two_hosts(launcher, "--config", _run(tmp_path), output=output) as process:
        assert process.wait(180) == 0, output.read_text()
    told = output.read_text()
    assert "2: tensor 2 x pipeline 1 x data 1" in told and "\x1b" not in told
    assert _losses(tmp_path / "run") == pytest.approx(expected, rel=2e-5)


@needs_namespaces
@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun",
        pytest.param("mpirun", marks=pytest.mark.slow),
        pytest.param("deepspeed", marks=pytest.mark.slow),
    ],
)
def test_two_hosts_go_on_after_a_rank_of_one_was_killed(
    launcher: str, expected: list[float], tmp_path: Path
) -> None:
    config, output = _run(tmp_path, save_every=1), tmp_path / "output"
    # So slow a link that the run lasts until it is seen.
    with two_hosts(launcher, "--config", config, output=output, rate="4mbit") as process:
        wait_until(has_taken(2, tmp_path / "run"), process, output)
        os.kill(_rank_on(host_names(process)[1]), signal.SIGKILL)
        assert process.wait(180) == 0, output.read_text()
    told = output.read_text()
    assert told.count("2: tensor 2 x pipeline 1 x data 1") == 2, told
    assert told.count("resuming from") == 1, told
    assert _losses(tmp_path / "run") == pytest.approx(expected, rel=2e-5)


LOCAL_RANKS = {
    "torchrun": {"PET_NPROC_PER_NODE": "2"},
    "mpirun": {"RANKS": "2"},
    "deepspeed": {"RANKS": "2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("launcher", LOCAL_RANKS)
def test_told_to_leave_all_ranks_save_first(
    launcher: str, asked: signal.Signals, tmp_path: Path
) -> None:
    config, output = _run(tmp_path, steps=100_000), tmp_path / "output"
    script = CHECKOUT / "launch" / f"{launcher}.sh"
    command = ("bash", script, "--config", config)
    variables = LOCAL_RANKS[launcher] | {"MASTER_PORT": str(free_port())}
    with started(*command, output=output, variables=variables) as process:
        wait_until(has_taken(2, tmp_path / "run"), process, output)
        process.send_signal(asked)
        assert process.wait(120) == 128 + asked, output.read_text()
    last = metrics(tmp_path / "run")[-1]["step"]
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [f"step-{last:08d}"]
