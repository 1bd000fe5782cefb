"""What this node is, and what of it would be in a run's way."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from uoe_parallel.doctor.faults import Fault

SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED_MEMORY = 1 << 30
"""Bytes: what NCCL's manual asks a container for. Docker's default is 64 MiB."""
DRIVER = Path("/proc/driver/nvidia/version")
CPUS = Path("/proc/cpuinfo")
THREADS = "OMP_NUM_THREADS"


def devices() -> list[str]:
    """The GPUs that this process sees, or its share of the CPU, for people."""
    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [f"{_processor()}, {_cores()} cores, {memory / 2**30:.0f} GiB"]


def _processor() -> str:
    lines = CPUS.read_text().splitlines() if CPUS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.machine())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def machine_faults(local_ranks: int, local_rank: int) -> Iterator[Fault]:
    """Of a node with `local_ranks` ranks, as number `local_rank` of them sees it."""
    on_cuda = torch.cuda.is_available()
    yield from thread_faults(os.environ, local_ranks, _cores(), torch.get_num_threads())
    yield from cuda_faults(local_rank)
    if on_cuda and local_ranks > 1:
        yield from shared_memory_faults(SHARED_MEMORY)
    yield from lock_faults(extensions_folder())


def thread_faults(
    environment: Mapping[str, str], local_ranks: int, cores: int, threads: int
) -> list[Fault]:
    """Whether `threads` of each rank are more than the cores that it may have."""
    if threads * local_ranks <= cores or threads == 1:
        return []
    given = environment.get(THREADS)
    set_to = "is not set" if given is None else f"is {given}"
    problem = (
        f"{THREADS} {set_to}: {local_ranks} ranks with {threads} threads each share {cores} cores, "
        "and wait for each other"
    )
    return [Fault(problem, f"export {THREADS}={max(1, cores // local_ranks)} before the launch")]


def cuda_faults(local_rank: int) -> Iterator[Fault]:
    """What keeps GPUs that are there from being used."""
    if not torch.cuda.is_available():
        if DRIVER.exists():
            yield Fault(*_unused_gpus())
        return
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        yield Fault(
            f"LOCAL_RANK is {local_rank}, and {visible} GPUs are visible",
            "start as many ranks on a node as it has GPUs, and look at CUDA_VISIBLE_DEVICES",
        )
    if not dist.is_nccl_available():
        yield Fault(
            f"torch {torch.__version__} was built for CUDA without NCCL",
            "install a build with NCCL, such as the one of requirements.txt",
        )


def _unused_gpus() -> tuple[str, str]:
    driver = DRIVER.read_text().splitlines()[0].strip()
    if torch.version.cuda is None:
        problem = f"there is a GPU ({driver}), and torch {torch.__version__} was built for CPUs"
        return problem, "install a build of torch for CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return (
            f"CUDA_VISIBLE_DEVICES={hidden!r} leaves no GPU to see",
            "unset it, or name GPUs that are there",
        )
    return (
        f"torch for CUDA {torch.version.cuda} finds no GPU, although there is a driver ({driver})",
        "update the driver to one for that CUDA; in a container, start it with its GPUs",
    )


def shared_memory_faults(folder: Path) -> list[Fault]:
    """Whether NCCL's ranks on one node have room to exchange through memory."""
    if not folder.exists():
        return []
    size = os.statvfs(folder).f_frsize * os.statvfs(folder).f_blocks
    if size >= ENOUGH_SHARED_MEMORY:
        return []
    advice = "give the container more: docker run --shm-size=1g, an emptyDir of medium Memory"
    return [Fault(f"{folder} has {size >> 20} MiB; NCCL wants 1 GiB", advice)]


def extensions_folder() -> Path:
    """Where torch and DeepSpeed build their C++ extensions."""
    default = cpp_extension.get_default_build_root()
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def lock_faults(folder: Path) -> Iterator[Fault]:
    """Locks of builds that nobody works at any more: who needs the extension waits for ever."""
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    held = _open_files() if locks else set()
    for lock in locks:
        if lock.resolve() not in held:
            yield Fault(
                f"{lock} was left by a build that was ended: every run that needs this extension "
                "waits for it without a word",
                f"if no other node is building there, rm -r {lock.parent}",
            )


def _open_files() -> set[Path]:
    """Of all processes that we may look at: who builds keeps the lock open."""
    files = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            files.add(descriptor.readlink())
        except OSError:  # the process has ended, or is another user's
            continue
    return files
