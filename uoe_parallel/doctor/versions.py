"""What is installed, and the code itself as a fingerprint."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.cuda import nccl

from uoe_parallel.doctor.faults import Fault

PACKAGE = Path(__file__).parent.parent
"""Of this code."""
CHECKOUT = PACKAGE.parent
"""The folder with its tests, unless the package was installed without them."""
_DISTRIBUTIONS = {
    "megatron-core": "megatron-core",
    "DeepSpeed": "deepspeed",
    "Apex": "apex",
    "Transformer Engine": "transformer-engine",
    "mpi4py": "mpi4py",
}
_SOURCES = {".py", ".sh", ".sbatch", ".yaml", ".toml", ".txt"}
_FROM_SOURCE = (
    "build NVIDIA's from its source, https://github.com/NVIDIA/apex: APEX_CPP_EXT=1 "
    "APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)


def installed_versions() -> dict[str, str]:
    """By name; "-" for what is not there."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "-",
        "NCCL": _nccl_version(),
    }
    return found | {name: _version(name_there) for name, name_there in _DISTRIBUTIONS.items()}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "-"


def _nccl_version() -> str:
    # A build for CUDA asks its NCCL, which needs no GPU; others lack the function that it calls.
    if not hasattr(torch._C, "_nccl_version"):
        return "-"
    return ".".join(map(str, nccl.version()))


def apex_faults(*, on_cuda: bool) -> list[Fault]:
    """Whether what imports as `apex` is NVIDIA's, and on CUDA whether it has its kernels."""
    found = find_spec("apex")
    if found is None:
        return []
    folders = found.submodule_search_locations or ()
    if not any(Path(folder, "optimizers").is_dir() for folder in folders):
        problem = (
            f"apex {_version('apex')} is not NVIDIA Apex: PyPI has another project of that name"
        )
        return [Fault(problem, f"pip uninstall apex; if Apex is wanted, {_FROM_SOURCE}")]
    if on_cuda and (find_spec("amp_C") is None or find_spec("fused_layer_norm_cuda") is None):
        problem = "NVIDIA Apex was built without its CUDA kernels, and its optimizer asks for them"
        return [Fault(problem, f"pip uninstall apex, then {_FROM_SOURCE}")]
    return []


def fingerprint(places: Iterable[Path]) -> str:
    """SHA-256 of all source and settings files in folders, names included, or of single files."""
    digest = hashlib.sha256()
    for place in places:
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.suffix in _SOURCES and file.is_file():
                digest.update(f"{file.relative_to(place.parent)}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def code_fingerprint() -> str:
    """Of the package that runs."""
    return fingerprint([PACKAGE])
