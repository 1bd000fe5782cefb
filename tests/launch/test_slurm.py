"""The batch script: its options, and the script itself with programs in SLURM's place."""

from __future__ import annotations

import random
import re
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.launch.starting import environment, has_taken, started, wait_until
from tests.programs import CHECKOUT, call_program, metrics, write_run

SCRIPT = CHECKOUT / "launch" / "slurm.sbatch"
FORMS = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d+:\d\d:\d\d",
    "output": r"[\w.%-]+",
    "open-mode": "append|truncate",
    "requeue": "",
    "signal": r"B:USR1@\d+",
}
"""Options of sbatch as its manual names them, and what the script may give them."""

_SRUN = r"""#!/usr/bin/env bash
# In srun's place: two tasks on this machine. Hands on signals, ends with the highest exit code.
echo "${*//$'\n'/;}" >>"$FOLDER/srun"
while [[ $1 != bash ]]; do shift; done
tasks=()
trap 'kill -s USR1 "${tasks[@]}"' USR1
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    code=0
    wait "$task" || code=$?
    while kill -0 "$task" 2>/dev/null; do
        code=0
        wait "$task" || code=$?
    done
    ((code <= highest)) || highest=$code
done
exit "$highest"
"""
_SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '%s\\n' 127.0.0.1 127.0.0.2 ;;
    requeue) echo "$2" >>"$FOLDER/requeued" ;;
esac
"""
_PYTHON = """#!/usr/bin/env bash
# In Python's place: notes what it is started with, and ends with the next exit code.
place="$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
echo "$place $*" >>"$FOLDER/python"
exit "$(sed -n "$(wc -l <"$FOLDER/srun")p" "$FOLDER/codes")"
"""


def _job(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a job with two tasks; `codes` gives every start an exit code instead."""
    programs = folder / "programs"
    programs.mkdir()
    stubs = {"srun": _SRUN, "scontrol": _SCONTROL}
    if "codes" in variables:
        stubs["python"] = _PYTHON
        (folder / "codes").write_text(variables.pop("codes"))
    for name, text in stubs.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    # sbatch runs a copy of the script.
    (folder / "slurm_script").write_text(SCRIPT.read_text())
    return {
        "PATH": f"{programs}:{environment()['PATH']}",
        "FOLDER": str(folder),
        "SLURM_SUBMIT_DIR": str(CHECKOUT),
        "SLURM_JOB_ID": "31415",
        "SLURM_JOB_NODELIST": "node[0-1]",
        **variables,
    }


def _free_number() -> str:
    """Of a job at whose port nobody listens."""
    for number in random.sample(range(10_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + number))
            return str(number)
    raise AssertionError("no port is free")


def _end(folder: Path, **variables: str) -> int:
    """The exit code of a job in which something stands for Python."""
    command = ("bash", folder / "slurm_script", "--config", "a file", "a.b=1")
    variables = _job(folder, **variables)
    with started(*command, output=folder / "output", variables=variables) as process:
        return process.wait(20)


def test_options_are_those_of_sbatch() -> None:
    lines = SCRIPT.read_text().split("set -euo pipefail")[0].splitlines()
    given = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    options = dict(f"{option}=".split("=")[:2] for option in given)
    assert options.keys() == FORMS.keys()
    for name, value in options.items():
        assert re.fullmatch(FORMS[name], value), name
    # sbatch reads no options after the first command.
    assert "#SBATCH" not in SCRIPT.read_text().split("set -euo pipefail")[1]


def test_every_task_gets_its_rank_and_the_arguments(tmp_path: Path) -> None:
    assert _end(tmp_path, codes="0", CONTAINER="image.sqsh") == 0
    program = "-m uoe_parallel.pretrain --config a file a.b=1"
    assert sorted((tmp_path / "python").read_text().splitlines()) == [
        f"{rank} {rank} 2 2 127.0.0.1 21415 {program}" for rank in range(2)
    ]
    [srun] = (tmp_path / "srun").read_text().splitlines()
    assert "--container-image image.sqsh " in srun and "--kill-on-bad-exit=0" in srun


@pytest.mark.parametrize(
    ("codes", "starts", "ended"), [("1\n137\n0", 3, 0), ("2", 1, 2), ("1\n1\n3", 3, 3)]
)
def test_failed_step_starts_again_in_the_same_job(
    codes: str, starts: int, ended: int, tmp_path: Path
) -> None:
    assert _end(tmp_path, codes=codes, RESTARTS="2") == ended
    assert (tmp_path / "python").read_text().count("\n") == 2 * starts
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_told_before_its_time_is_over_it_saves_and_queues_again(
    ranks: Ranks, tmp_path: Path
) -> None:
    config = write_run(tmp_path, parallel={"tensor": 2}, training={"steps": 10_000})
    output, run_dir = tmp_path / "output", tmp_path / "run"
    command = ("bash", tmp_path / "slurm_script", "--config", config)
    number = _free_number()
    variables = _job(tmp_path, SLURM_JOB_ID=number)
    with started(*command, output=output, variables=variables) as process:
        wait_until(has_taken(2, run_dir), process, output)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 138, output.read_text()
    assert (tmp_path / "requeued").read_text() == f"{number}\n"
    assert (tmp_path / "srun").read_text().count("pretrain") == 1

    # The same job again finds what was saved.
    last = metrics(run_dir)[-1]["step"]
    shorter = last + 2
    [first, _] = ranks(2).run(call_program, "--config", config, f"training.steps={shorter}")
    assert first.code == 0, first.err
    assert f"{last} of {shorter} steps are done" in first.out
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, shorter + 1))
