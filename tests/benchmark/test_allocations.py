"""Bytes of tensors, against what can be counted by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_parallel.benchmark.allocations import kept_for_backward, peak_memory, storage_bytes
from uoe_parallel.parallel.device import Device

CPU = Device(torch.device("cpu"), "gloo")
SIZE = 1 << 16
BYTES = 4 * SIZE


def _peak_of(copies: int, *, leak: bool = False) -> int:
    x = torch.ones(SIZE)
    kept: list[Tensor] = []

    def run() -> None:
        for _ in range(copies):
            copy = x.clone()
            if leak:
                kept.append(copy)

    return peak_memory(run, CPU)


def test_what_is_freed_is_not_counted_twice() -> None:
    # A copy lives until its name gets the next one.
    assert _peak_of(1) == BYTES
    assert _peak_of(5) == 2 * BYTES


def test_a_leak_of_one_copy_shows() -> None:
    assert _peak_of(5, leak=True) == 5 * BYTES


def test_what_lived_before_is_not_counted() -> None:
    x = torch.ones(SIZE)
    assert peak_memory(x.neg_, CPU) == 0


def test_the_peak_may_lie_in_the_backward_pass() -> None:
    x = torch.ones(SIZE, requires_grad=True)
    upstream = torch.ones(SIZE)

    def forward() -> Tensor:
        return x.exp()

    assert peak_memory(forward, CPU) == BYTES
    # The result, which is kept for backward too, and the gradient, which is x's own then.
    assert peak_memory(lambda: forward().backward(upstream), CPU) == 2 * BYTES


def test_buffers_of_a_kernel_are_seen() -> None:
    """Which nothing that looks at the results of operations could see."""
    q = torch.ones(1, 1, 64, 8)
    found: list[Tensor] = []

    def attend() -> None:
        found.extend(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q))

    peak = peak_memory(attend, CPU)
    scores_of_a_block = 4 * 32 * 64
    assert peak >= storage_bytes(found) + scores_of_a_block


def test_kept_storages_are_counted_once() -> None:
    w = torch.ones(SIZE, requires_grad=True)
    with kept_for_backward() as kept:
        x = w.exp()  # kept: x
        y = x.view(2, -1) * x.view(2, -1)  # kept: views of it
        z = y.sin()  # kept: y
        z.sum()
    assert storage_bytes(kept) == 2 * BYTES
    assert storage_bytes(kept, besides=[x]) == BYTES
