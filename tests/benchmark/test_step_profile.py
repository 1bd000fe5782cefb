"""The time of a step by kinds of operations."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from tests.harness import Ranks
from uoe_parallel.benchmark.step_profile import (
    ATTENTION,
    COMMUNICATION,
    HOST,
    OTHER,
    PRODUCTS,
    REST,
    ROWS,
    WORK,
    kind_of,
    profile_steps,
    seconds_by_kind,
    table,
    timed_waits,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", PRODUCTS),
        ("aten::_grouped_mm", PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("c10d::alltoall_base_", COMMUNICATION),
        ("aten::index_select", ROWS),
        ("aten::gelu", OTHER),
        ("MmBackward0", HOST),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_every_moment_counts_once() -> None:
    """What a product calls counts to it, what a scope of the host calls to what it is."""
    x = torch.randn(64, 64)
    with (
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler,
        record_function("a layer"),
    ):
        torch.matmul(x, x)
        torch.nn.functional.gelu(x)
    events: Any = profiler.events()
    seconds = seconds_by_kind(events, wall_seconds=1.0)
    assert sum(seconds.values()) == pytest.approx(1.0)
    assert seconds[PRODUCTS] > 0 and seconds[OTHER] > 0 and seconds[COMMUNICATION] == 0
    assert seconds[HOST] > 0.5


class _Trainer:
    """Steps that multiply, wait for the other rank and copy."""

    def train_step(self) -> None:
        x = torch.ones(64, 64) @ torch.ones(64, 64)
        dist.all_reduce(x)
        x.index_select(0, torch.arange(64)).relu()


def _profiled() -> dict[str, float]:
    wait: Any = dist.Work.wait
    found = profile_steps(_Trainer(), steps=3, warmup=1)
    assert dist.Work.wait is wait
    return found


def test_shares_of_a_step_add_up(ranks: Ranks) -> None:
    by_rank = ranks(2).run(_profiled)
    for found in by_rank:
        assert sum(found[kind] for kind in WORK + REST) == pytest.approx(found["step"])
        assert found[PRODUCTS] > 0 and found[COMMUNICATION] > 0
    text = table(by_rank)
    assert "| these three |" in text and text.count("\n") == 9


def _waited() -> float:
    """Rank 1 comes late."""
    if dist.get_rank() == 1:
        time.sleep(0.2)
    with timed_waits() as seconds:
        dist.all_reduce(torch.ones(1))
    return sum(seconds)


def test_waiting_for_another_rank_is_communication(ranks: Ranks) -> None:
    first, second = ranks(2).run(_waited)
    assert first > second
