"""What of a node would be in a run's way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from uoe_parallel.doctor import machine
from uoe_parallel.doctor.faults import Fault
from uoe_parallel.doctor.machine import (
    cuda_faults,
    devices,
    lock_faults,
    shared_memory_faults,
    thread_faults,
)
from uoe_parallel.doctor.versions import apex_faults, fingerprint, installed_versions


def _only(faults: Sequence[Fault]) -> str:
    [fault] = faults
    return f"{fault.problem}; {fault.advice}"


def test_versions_are_those_that_import() -> None:
    versions = installed_versions()
    assert versions["torch"] == torch.__version__
    assert versions["CUDA"] == (torch.version.cuda or "-")
    assert versions["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["DeepSpeed"] != "-" and versions["megatron-core"] != "-"


@pytest.mark.parametrize(("ranks", "cores", "threads"), [(2, 4, 2), (8, 4, 1), (1, 2, 2)])
def test_threads_that_fit_are_no_fault(ranks: int, cores: int, threads: int) -> None:
    assert thread_faults({}, ranks, cores, threads) == []


def test_more_threads_than_cores_are_told() -> None:
    unset = _only(thread_faults({}, 2, 4, 4))
    assert "OMP_NUM_THREADS is not set: 2 ranks with 4 threads each share 4 cores" in unset
    assert "export OMP_NUM_THREADS=2 before" in unset
    assert "OMP_NUM_THREADS is 8: " in _only(thread_faults({"OMP_NUM_THREADS": "8"}, 1, 4, 8))


def test_only_locks_that_nobody_holds_are_stale(tmp_path: Path) -> None:
    for extension in ("py311_cpu/shm", "other"):
        (tmp_path / extension).mkdir(parents=True)
    held, stale = tmp_path / "py311_cpu/shm/lock", tmp_path / "other/lock"
    stale.touch()
    with held.open("w"):
        told = _only(list(lock_faults(tmp_path)))
        assert f"{stale} was left by a build that was ended" in told
        assert f"rm -r {stale.parent}" in told
    assert len(list(lock_faults(tmp_path))) == 2
    assert list(lock_faults(tmp_path / "missing")) == []


def test_shared_memory_of_a_container_may_be_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SimpleNamespace(f_frsize=4096, f_blocks=16384)
    monkeypatch.setattr(machine.os, "statvfs", lambda path: sizes)
    told = _only(shared_memory_faults(tmp_path))
    assert f"{tmp_path} has 64 MiB" in told and "--shm-size" in told
    sizes.f_blocks *= 16
    assert shared_memory_faults(tmp_path) == []


def _package(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)


def test_another_project_by_the_name_of_apex_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, monkeypatch, "apex", "apex/models")
    told = _only(apex_faults(on_cuda=False))
    assert "is not NVIDIA Apex" in told
    assert "pip uninstall apex" in told and "github.com/NVIDIA/apex" in told


def test_apex_needs_its_kernels_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, monkeypatch, "apex", "apex/optimizers")
    assert apex_faults(on_cuda=False) == []
    assert "without its CUDA kernels" in _only(apex_faults(on_cuda=True))
    _package(tmp_path / "more", monkeypatch, "amp_C", "fused_layer_norm_cuda")
    assert apex_faults(on_cuda=True) == []


def _gpus(monkeypatch: pytest.MonkeyPatch, number: int, *, nccl: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)


def test_a_rank_needs_a_gpu_of_its_own_and_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 2)
    assert list(cuda_faults(1)) == []
    assert "LOCAL_RANK is 2, and 2 GPUs are visible" in _only(list(cuda_faults(2)))
    _gpus(monkeypatch, 2, nccl=False)
    assert "for CUDA without NCCL" in _only(list(cuda_faults(0)))


@pytest.mark.parametrize(
    ("cuda", "visible", "problem"),
    [
        (None, None, "was built for CPUs"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES='' leaves no GPU"),
        ("13.0", None, "torch for CUDA 13.0 finds no GPU"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    visible: str | None,
    problem: str,
) -> None:
    _gpus(monkeypatch, 0)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    assert list(cuda_faults(0)) == []
    (tmp_path / "version").write_text("NVRM version: 580.1\nGCC\n")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert problem in _only(list(cuda_faults(0)))


def test_without_a_gpu_the_cpu_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 0)
    [device] = devices()
    assert " cores, " in device and device.endswith(" GiB")


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    code, data = tmp_path / "code", tmp_path / "code" / "data.bin"
    (code / "inner").mkdir(parents=True)
    (code / "inner" / "a.py").write_text("a = 1\n")
    first = fingerprint([code])
    data.write_bytes(b"no source")
    assert fingerprint([code]) == first
    (code / "inner" / "a.py").write_text("a = 2\n")
    second = fingerprint([code])
    (code / "inner" / "a.py").rename(code / "inner" / "b.py")
    assert len({first, second, fingerprint([code])}) == 3
