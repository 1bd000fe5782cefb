"""Expected times, against what follows by hand from round numbers."""

from __future__ import annotations

import pytest

from tests.planning.cases import machine
from uoe_parallel.analysis.flops import Computation
from uoe_parallel.analysis.states import ModelStates
from uoe_parallel.analysis.transfer import Operation, Transfer
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.planning.time import (
    Route,
    StageTime,
    Work,
    stage_time,
    step_time,
    transfer_seconds,
)

MACHINE = machine()
ON_A_NODE = Route.of(range(4), MACHINE)
ONE_EACH = Route.of(range(0, 32, 4), MACHINE)
TWO_EACH = Route.of([0, 1, 4, 5, 8, 9], MACHINE)


def _transfer(operation: Operation, payload: int, calls: int = 1, kept: int = 0) -> Transfer:
    return Transfer(Purpose.HEAD, "forward", "data", operation, calls, payload, kept)


def test_routes_know_nodes() -> None:
    assert (ON_A_NODE.size, ON_A_NODE.inter, ON_A_NODE.bandwidth, ON_A_NODE.hop) == (
        *(4, None, 1e10),
        1e-6,
    )
    assert (ONE_EACH.size, ONE_EACH.share, ONE_EACH.bandwidth, ONE_EACH.hop) == (8, 1, 1e9, 1e-5)
    # A ring enters and leaves a node over the links of both of its devices.
    assert (TWO_EACH.size, TWO_EACH.share, TWO_EACH.bandwidth) == (6, 2, 2e9)
    # The node with one device is the narrowest.
    assert Route.of([0, 1, 4], MACHINE).bandwidth == 1e9
    # No link of many lets a ring go faster than it goes between the devices of a node.
    assert Route.of(range(64), machine(devices_per_node=32)).bandwidth == 1e10


@pytest.mark.parametrize(
    ("operation", "payload", "route", "seconds"),
    [
        ("all_gather", 10**8, ON_A_NODE, 3 * (1e-6 + 1e-2)),
        ("reduce_scatter", 4 * 10**8, ON_A_NODE, 3 * (1e-6 + 1e-2)),
        ("all_reduce", 4 * 10**8, ON_A_NODE, 2 * 3 * (1e-6 + 1e-2)),  # as a ring
        ("all_reduce", 8, ONE_EACH, 2 * 3 * 1e-5 + 2 * 8 / 1e9),  # as a tree
        ("broadcast", 10**9, ONE_EACH, 3 * 1e-5 + 1),
        ("send", 10**9, ONE_EACH, 1e-5 + 1),
        ("all_to_all", 3 * 10**9, ON_A_NODE, 3e-6 + 0.3),
        # Of five others one is on the node, and four parts leave over the own link.
        ("all_to_all", 5 * 10**9, TWO_EACH, 1e-6 + 4e-5 + 4.0),
    ],
)
def test_collectives(operation: Operation, payload: int, route: Route, seconds: float) -> None:
    assert transfer_seconds(_transfer(operation, payload), route) == pytest.approx(seconds)
    thrice = _transfer(operation, 3 * payload, calls=3)
    assert transfer_seconds(thrice, route) == pytest.approx(3 * seconds)


def test_what_a_rank_keeps_does_not_travel() -> None:
    kept = _transfer("all_to_all", 4 * 10**9, kept=10**9)
    assert transfer_seconds(kept, ON_A_NODE) == pytest.approx(3e-6 + 0.3)
    assert transfer_seconds(kept, Route.of([3], MACHINE)) == 0


def _work(*, overlaps: bool = False, recompute: int = 0, weights: int = 0) -> Work:
    computations = [
        Computation("experts", "forward", 10**12),
        Computation("experts", "recompute", recompute),
        Computation("experts", "backward", 2 * 10**12),
    ]
    gathered = Transfer(Purpose.WEIGHTS, "forward", "data", "all_gather", 2, 2 * 10**9, 0)
    dispatched = Transfer(Purpose.DISPATCH_ROWS, "forward", "tensor", "send", 2, 2 * 10**10, 0)
    reduced = Transfer(Purpose.GRADIENTS, "step", "data", "all_gather", 1, 10**9, 0)
    return Work(
        computations=computations,
        kept=10**10,
        weights=weights,
        layers=3,
        states=ModelStates(weights=10**9, gradients=10**9, optimizer=3 * 10**9),
        traffic=[gathered, dispatched, reduced],
        micro_batches=2,
        overlaps=overlaps,
    )


ROUTES = {"data": ON_A_NODE, "tensor": ON_A_NODE}
GATHERED = 3 * (1e-6 + 0.1)
SENT = 1e-6 + 1.0


def test_a_stage() -> None:
    time = stage_time(_work(), ROUTES, MACHINE, "fp32")
    assert time.products == pytest.approx(3e12 / 0.5e12)
    assert time.memory == pytest.approx(4 * 10**10 / 1e11)
    assert time.communication == pytest.approx(GATHERED + SENT)
    assert time.hidden == 0
    assert time.after == pytest.approx(GATHERED)
    assert time.optimizer == pytest.approx((2 * (3 + 1) + 1) * 10**9 / 1e11)
    assert time.micro_batch == time.products + time.memory + time.communication


def test_only_zero_hides_and_only_behind_products() -> None:
    time = stage_time(_work(overlaps=True), ROUTES, MACHINE, "fp32")
    assert time.hidden == pytest.approx(GATHERED)
    assert time.communication == pytest.approx(SENT)
    fast = machine(flops={"fp32": 1e20})
    assert stage_time(_work(overlaps=True), ROUTES, fast, "fp32").hidden < 1e-6


def test_recomputation_and_weights_take_time() -> None:
    again = stage_time(_work(recompute=10**12), ROUTES, MACHINE, "fp32")
    assert again.products == pytest.approx(4e12 / 0.5e12)
    assert again.memory == pytest.approx(6 * 10**10 / 1e11)
    # Forward the weights' 4 s are longer than the products' 2 s, backward 8 s than 4 s.
    heavy = stage_time(_work(weights=4 * 10**11), ROUTES, MACHINE, "fp32")
    assert heavy.products == pytest.approx(4 + 8)


def test_a_device_waits_for_its_host() -> None:
    """Which takes twelve seconds to queue three layers, four more if their forward pass comes
    twice; on a CPU it is the device."""
    host = {"layer_overhead": 4.0}
    time = stage_time(_work(), ROUTES, machine(**host), "fp32")
    assert time.host == 12
    busy = time.products + time.memory + time.communication
    assert time.micro_batch == busy + 12
    assert stage_time(_work(recompute=10**12), ROUTES, machine(**host), "fp32").host == 16
    waits = stage_time(_work(), ROUTES, machine(**host, device="cuda"), "fp32")
    assert waits.micro_batch == pytest.approx(max(busy, 12))
    fast = {"flops": {"fp32": 1e15}, "memory_bandwidth": 1e15}
    waits = stage_time(_work(), ROUTES, machine(**host, **fast, device="cuda"), "fp32")
    assert waits.micro_batch == pytest.approx(12)


def test_stages_take_turns() -> None:
    slow = StageTime(products=3, memory=1, communication=1, hidden=9, host=0, after=1, optimizer=1)
    fast = StageTime(products=1, memory=1, communication=1, hidden=9, host=0, after=3, optimizer=1)
    time = step_time([fast, slow], pipeline=4, micro_batches=5)
    assert time.seconds == (5 + 4 - 1) * 5 + 4
    assert time.bubble == 3 / 8
    assert step_time([fast], pipeline=1, micro_batches=5).bubble == 0
