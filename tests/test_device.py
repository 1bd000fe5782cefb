"""The device that tests run on: how it is chosen, and what is put there."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import device
from tests.device import VARIABLE, chosen_device, missing_device, skip_without_gpus
from tests.harness import Ranks
from tests.harness.placing import Placing, pickled
from tests.programs import CHECKOUT
from uoe_parallel.experts.cache import KeyValueCache

META = torch.device("meta")
_PYTHON_STUB = """#!/usr/bin/env bash
# Stands for every program of the environment: says what it is asked for; only the look at the
# device is real.
case "$*" in
    "-m tests.device") cd {checkout} && exec {python} -m tests.device ;;
    *) echo "$(basename "$0") $* on $UOE_TEST_DEVICE" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """tests/run.sh in a checkout with an environment whose programs only say what they would do."""
    names = ("launch/environment.sh", "tests/run.sh", "pyproject.toml")
    for name in (*names, "requirements.txt", "requirements-test.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "ruff", "pyright"):
        (programs / name).write_text(_PYTHON_STUB.format(checkout=CHECKOUT, python=sys.executable))
        (programs / name).chmod(0o755)
    pins = "cat pyproject.toml requirements.txt requirements-test.txt | sha256sum | cut -c1-16"
    made = f'echo "$PWD $({pins}) requirements-test.txt" >.venv/installed'
    subprocess.run(["bash", "-c", made], cwd=tmp_path, check=True)
    return tmp_path


def _run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "tests/run.sh", *arguments],
        cwd=checkout,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("--device", "cpu", "tests/model", "-x"), "-m pytest -m not slow tests/model -x on cpu"),
        (("-k", "a b", "--slow", "--device", "cpu"), "-m pytest -k a b on cpu"),
    ],
)
def test_the_device_is_an_option_of_the_tests(
    checkout: Path, arguments: tuple[str, ...], asked: str
) -> None:
    ended = _run(checkout, *arguments)
    assert ended.returncode == 0, ended
    assert f"\npython {asked}\n" in ended.stdout


def test_without_a_gpu_there_is_one_message(checkout: Path) -> None:
    ended = _run(checkout, "--device", "cuda")
    assert ended.returncode == 2
    assert "ruff" not in ended.stdout and "pytest" not in ended.stdout
    [told] = ended.stderr.splitlines()
    assert told.startswith(f"--device cuda: torch {torch.__version__} sees no GPU here")


@pytest.mark.parametrize("arguments", [("--device", "tpu"), ("--device",)])
def test_other_devices_are_refused(checkout: Path, arguments: tuple[str, ...]) -> None:
    ended = _run(checkout, *arguments)
    assert ended.returncode == 2
    [told] = ended.stderr.splitlines()
    assert told.startswith("--device is cpu or cuda, not '")


def _where() -> tuple[str, str]:
    """Device of what a test makes on a rank, and the backends of its world."""
    return torch.zeros(1).device.type, dist.get_backend_config()


def test_ranks_compute_on_the_chosen_device(ranks: Ranks) -> None:
    on_cpu = chosen_device() == "cpu"
    expected = ("cpu", "cpu:gloo,cuda:gloo") if on_cpu else ("cuda", "cpu:gloo,cuda:nccl")
    assert ranks(2).run(_where) == [expected] * 2
    assert (os.environ.get("CUDA_VISIBLE_DEVICES") == "") == on_cpu


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    monkeypatch.setattr(device, "gpus", lambda: 0)
    assert "sees no GPU here" in (missing_device() or "")
    monkeypatch.setattr(device, "gpus", lambda: 1)
    assert missing_device() is None
    monkeypatch.setenv(VARIABLE, "tpu")
    assert missing_device() == "--device is cpu or cuda, not 'tpu'"


def test_a_test_for_more_gpus_than_there_are_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpus", lambda: 2)
    monkeypatch.setenv(VARIABLE, "cuda")
    skip_without_gpus(2)
    with pytest.raises(pytest.skip.Exception, match="4 ranks need 4 GPUs, and this machine has 2"):
        skip_without_gpus(4)
    monkeypatch.setenv(VARIABLE, "cpu")
    skip_without_gpus(4)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_tests_tensors_go_to_the_device_and_the_package_s_stay() -> None:
    with Placing(META):
        made = [torch.zeros(2), torch.tensor([1.0]), torch.arange(3), _drawn(2, 2)]
        needs_gradient = torch.ones(2, requires_grad=True)
        named, packages = torch.ones(2, device="cpu"), KeyValueCache().lengths_G
    assert [tensor.device for tensor in made] == [META] * len(made)
    assert needs_gradient.device == META and needs_gradient.requires_grad
    assert (named.device.type, packages.device.type) == ("cpu", "cpu")
    assert torch.zeros(1).device.type == "cpu"


def test_numbers_of_a_generator_are_those_of_every_device() -> None:
    with Placing(torch.device("cpu")):
        assert torch.equal(_drawn(3), (placed := _drawn(3)))
    assert torch.equal(_drawn(3), placed)


def test_results_are_pickled_whole() -> None:
    value = {"x": [torch.arange(3), META], "n": 1}
    again = pickle.loads(pickled(value))
    assert torch.equal(again["x"][0], torch.arange(3)) and again["n"] == 1
