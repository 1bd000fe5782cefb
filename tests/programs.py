"""The program as a test starts it: what it reads, a call on a rank, and a real launch."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.device import skip_without_gpus
from tests.tiny import tiny_config, write_corpus
from uoe_parallel.config.load import save_config
from uoe_parallel.inference.sampling import Sampling
from uoe_parallel.pretrain import main

CHECKOUT = Path(__file__).parent.parent
MPIRUN_ANYWHERE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""Lets Open MPI start ranks in a container: as root, and more of them than it counts cores."""
COUNTS = ("--nproc-per-node", "--num_gpus", "-n")
"""Options of launchers that say how many ranks a machine starts."""
SHORT_TEXT = Sampling(num_tokens=20, temperature=0.7)
"""At the end of a run, beyond its context of 16: the 200 tokens of the program take most of the
time of a tiny run."""


@dataclass(frozen=True)
class Outcome:
    """How the program ended on one rank, or a whole launch of it."""

    code: int
    out: str
    err: str


def write_run(folder: Path, **sections: dict[str, Any] | str | int) -> Path:
    """Corpora in `folder` and a tiny run of two steps on them, in `folder`/run; its YAML's path.

    Keyword arguments update whole sections, as for `tiny_config`.
    """
    # Ids from another range make other text of the same random numbers.
    data = {
        split: str(write_corpus(folder / split, size, vocab_size=ids))
        for split, size, ids in (("train", 2000, 256), ("validation", 200, 250), ("test", 200, 200))
    }
    changes: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": data,
        "training": {},
        "logging": {"every": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        old = changes.get(name)
        if isinstance(old, dict) and isinstance(section, dict):
            section = {**old, **section}
        changes[name] = section
    path = folder / "run.yaml"
    save_config(tiny_config(**changes), path)
    return path


def call_program(
    *arguments: str | Path, folder: Path | None = None, folders: Sequence[Path] = ()
) -> Outcome:
    """Call the program on a rank, in the working folder `folder`, or rank r in `folders`[r]."""
    if folders:
        folder = folders[int(os.environ["RANK"])]
    out, err = io.StringIO(), io.StringIO()
    with (
        chdir(folder or Path.cwd()),
        redirect_stdout(out),
        redirect_stderr(err),
        patch("uoe_parallel.training.generation._SAMPLING", SHORT_TEXT),
    ):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def only_complaint(outcomes: Sequence[Outcome]) -> str:
    """What rank 0 tells the user, after a check that every rank ended with code 2 and that
    nobody said anything else."""
    assert [outcome.code for outcome in outcomes] == [2] * len(outcomes), outcomes
    first, *others = (outcome.err for outcome in outcomes)
    assert others == [""] * len(others)
    assert first.startswith("uoe-pretrain: ") and first.count("uoe-pretrain: ") == 1, first
    assert "Traceback" not in first
    return first


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of one kind in the run's metrics.jsonl."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def curves(run_dir: Path) -> list[list[Any]]:
    """What must not depend on how often a run was ended and started again."""
    kinds = ("train", "validation", "test")
    names = ("step", "kind", "loss", "gradient_norm", "learning_rate", "accuracy")
    return [[r.get(name) for name in names] for kind in kinds for r in metrics(run_dir, kind)]


def script(name: str) -> str:
    """A program that is installed beside this Python."""
    path = Path(sys.executable).parent / name
    assert path.exists(), f"{path} is missing: install requirements-test.txt"
    return str(path)


def launch(command: Sequence[str | Path], timeout: float = 90) -> Outcome:
    """Run `command` in the checkout; after `timeout` seconds kill it with all it started.

    Skips the test where the command asks for more ranks than there are GPUs for them.
    """
    words = [str(part) for part in command]
    counts = (count for option, count in pairwise(words) if option in COUNTS)
    skip_without_gpus(max(map(int, counts), default=1))
    process = subprocess.Popen(
        words,
        cwd=CHECKOUT,
        env=os.environ | MPIRUN_ANYWHERE | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Outcome(process.returncode, out, err)
