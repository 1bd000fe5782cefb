"""The device that tests run on, as `bash tests/run.sh --device cpu|cuda` chooses it.

`python -m tests.device` says whether this machine has it.
"""

from __future__ import annotations

import os
import sys

import pytest

VARIABLE = "UOE_TEST_DEVICE"
DEVICES = ("cpu", "cuda")


def chosen_device() -> str:
    """ "cpu", unless someone said "cuda"."""
    return os.environ.get(VARIABLE) or DEVICES[0]


def gpus() -> int:
    """That this process sees."""
    import torch

    return torch.cuda.device_count()


def use_chosen_device() -> str | None:
    """Hides GPUs from this process and all that it starts, if tests are to run on the CPU;
    returns why no test can run, None if the device is there."""
    if chosen_device() == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return missing_device()


def missing_device() -> str | None:
    """Why no test can run on the chosen device, None if it is there."""
    device = chosen_device()
    if device not in DEVICES:
        return f"--device is {' or '.join(DEVICES)}, not {device!r}"
    if device == "cuda" and gpus() == 0:
        import torch

        return (
            f"--device cuda: torch {torch.__version__} sees no GPU here. Run it on a machine that "
            "has one with a build of torch for CUDA, or run --device cpu; python -m "
            "uoe_parallel.doctor tells what is there"
        )
    return None


def skip_without_gpus(ranks: int) -> None:
    """Skip the test that calls this if every rank is to have a GPU of its own, which NCCL asks for,
    and there are fewer."""
    if chosen_device() == "cuda" and ranks > (found := gpus()):
        pytest.skip(f"{ranks} ranks need {ranks} GPUs, and this machine has {found}")


if __name__ == "__main__":
    if told := missing_device():
        print(told, file=sys.stderr)
        sys.exit(2)
