"""Where tensors go that a test makes on a rank without a word about devices."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from uoe_parallel.parallel.device import Device

FACTORIES = {
    *(torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace),
    *(torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor),
    torch.zeros,
}


class Placing(TorchFunctionMode):
    """Tests' tensors are made on `device`.

    Not those that the package makes: it says where, or means the CPU, as in a run. What comes of a
    generator is drawn where that is and moved, so that the numbers are those of every device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        caller = sys._getframe(1).f_globals.get("__name__", "")
        is_tests = caller.partition(".")[0] == "tests"
        if not is_tests or func not in FACTORIES or named.get("device") is not None:
            return func(*args, **named)
        if named.get("generator") is None:
            return func(*args, **named | {"device": self.device})
        needs_gradient = named.pop("requires_grad", False)
        return func(*args, **named).to(self.device).requires_grad_(needs_gradient)


def placing(device: Device) -> AbstractContextManager[object]:
    """A block of a test on a rank with this device."""
    return Placing(device.torch_device) if device.is_cuda else nullcontext()


class _ToCPU(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            return obj.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def pickled(value: object) -> bytes:
    """For the test process, which compares on the CPU."""
    buffer = io.BytesIO()
    _ToCPU(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()
