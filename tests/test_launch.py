"""Scripts that start something, and the commands that the documentation tells to type."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from tests.programs import CHECKOUT
from tests.programs import script as installed
from uoe_parallel.config.load import load_config
from uoe_parallel.parallel.layout import layout_faults
from uoe_parallel.pretrain import parse_arguments

SCRIPTS = sorted(
    [
        *(path for folder in ("launch", "tests") for path in (CHECKOUT / folder).glob("**/*.sh")),
        CHECKOUT / "launch/slurm.sbatch",
        *(CHECKOUT / "tests/launch/remote").iterdir(),
        CHECKOUT / ".ci/run",
    ]
)
DOCUMENTS = sorted(
    {
        CHECKOUT / "README.md",
        *(path for folder in ("docs", "launch") for path in (CHECKOUT / folder).glob("**/*.md")),
    }
)
PROGRAMS = ("uoe_parallel.pretrain", "uoe-pretrain")
LAUNCHERS = [f"launch/{name}" for name in ("torchrun.sh", "deepspeed.sh", "mpirun.sh")]
LAUNCHERS.append("launch/slurm.sbatch")
"""Scripts whose arguments are the program's."""

_FENCE = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"(launch|tests|tools|configs|docker|\.ci)/[\w./-]+")


def _name(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def _commands(document: Path) -> list[list[str]]:
    """The words of every command in the shell blocks of a document."""
    commands = []
    for block in _FENCE.findall(document.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                commands.append(words)
    return commands


def _ranks(command: list[str]) -> int:
    """How many ranks a launcher's command line starts."""
    counts = [
        int(count)
        for option, count in pairwise(command)
        if option in ("--nproc-per-node", "--num_gpus", "-n", "-np", "--nnodes")
    ]
    return prod(counts)


def _program_arguments(script: str) -> list[str]:
    """What a script passes to the program, without what the user adds."""
    command = script.replace("\\\n", " ").split("uoe_parallel.pretrain", 1)[1]
    return [word for word in shlex.split(command.splitlines()[0]) if word != "$@"]


def test_shellcheck_finds_nothing_in_scripts() -> None:
    options = ("--external-sources", "--source-path=SCRIPTDIR", "--severity=warning")
    checked = subprocess.run(
        [installed("shellcheck"), "--shell=bash", *options, *SCRIPTS],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_script_names_files_that_exist(script: Path) -> None:
    code = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    for match in _PATH.finditer("\n".join(code)):
        assert (CHECKOUT / match[0]).exists(), match[0]


def test_quickstart_trains_on_the_corpus_that_it_makes() -> None:
    script = (CHECKOUT / "launch/quickstart.sh").read_text()
    options = parse_arguments(_program_arguments(script))
    config = load_config(CHECKOUT / options.config, options.overrides)
    made = re.search(r"make_quickstart_corpus\.py (\S+)", script)
    ranks = re.search(r"--nproc-per-node (\d+)", script)
    assert made and ranks
    for split in ("train", "validation", "test"):
        assert getattr(config.data, split) == f"{made[1]}/{split}"
    assert int(ranks[1]) % config.parallel.tensor == 0


def test_readme_has_the_two_commands() -> None:
    commands = _commands(CHECKOUT / "README.md")
    for command in ("bash launch/quickstart.sh", "bash tests/run.sh"):
        assert command.split() in commands


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_commands_in_documents_name_files_that_exist(document: Path) -> None:
    for command in _commands(document):
        for word in command:
            if _PATH.fullmatch(word):
                assert (CHECKOUT / word).exists(), " ".join(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_commands_in_documents_are_understood(document: Path) -> None:
    for command in _commands(document):
        program = next((word for word in command if word in (*PROGRAMS, *LAUNCHERS)), None)
        if program is None:
            continue
        arguments = command[command.index(program) + 1 :]
        if "--help" in arguments:
            continue
        options = parse_arguments(arguments)
        if (CHECKOUT / options.config).exists():
            world_size = _ranks(command)
            checks = [lambda config, ranks=world_size: layout_faults(config, ranks)]
            # How many ranks a script starts is up to variables and hostfiles.
            checks = checks if program in PROGRAMS else []
            load_config(CHECKOUT / options.config, options.overrides, checks)


def test_a_step_that_fails_is_named_and_ends_the_script(tmp_path: Path) -> None:
    script = f"source {CHECKOUT}/launch/environment.sh; step first true; step second false; echo on"
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"working in {CHECKOUT}" in ended.stdout
    assert "==> first: done" in ended.stdout
    assert "FAILED: second" in ended.stderr
    assert "on" not in ended.stdout.split()


_PYTHON_STUB = """#!/usr/bin/env bash
# Says that it is Python {version}, makes environments of itself, installs nothing.
case "$1 ${{2:-}}" in
    "--version ") echo "Python {version}" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


def _environment(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Make the environment of `checkout`; the last line is its folder and its Python's version."""
    script = (
        "set -euo pipefail; source launch/environment.sh; make_environment requirements.txt;"
        'echo "$environment: $("$environment/bin/python" --version)"'
    )
    return subprocess.run(
        ["bash", "-c", script],
        cwd=checkout,
        env={"PATH": f"{checkout}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_python_3_12_has_an_environment_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    names = ("launch/environment.sh", "pyproject.toml", "requirements.txt", "requirements-test.txt")
    for name in names:
        shutil.copy(CHECKOUT / name, tmp_path / name)
    for name, version in (("python3.11", "3.11.9"), ("another", "3.12.1")):
        (tmp_path / name).write_text(_PYTHON_STUB.format(version=version))
        (tmp_path / name).chmod(0o755)

    for told in ("make {} with Python", "found {} with requirements.txt"):
        default = _environment(tmp_path)
        assert f"==> environment: {told.format('.venv')}" in default.stdout, default
        assert default.stdout.endswith("\n.venv: Python 3.11.9\n")
        other = _environment(tmp_path, PYTHON="another")
        assert f"==> environment: {told.format('.venv-3.12')}" in other.stdout, other
        assert other.stdout.endswith("\n.venv-3.12: Python 3.12.1\n")

    named = _environment(tmp_path, PYTHON="python3.11")
    assert "found .venv with requirements.txt" in named.stdout, named
    refused = _environment(tmp_path, PYTHON="no-python")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "'no-python' is not one" in refused.stderr
