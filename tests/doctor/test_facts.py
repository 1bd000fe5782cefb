"""What ranks do not have in common is told with the ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.tiny import tiny_config
from uoe_parallel.doctor.facts import MISTAKE, Facts, compared, config_values
from uoe_parallel.doctor.faults import Fault, ranks_text, told

CONFIG = config_values(tiny_config())
ONE = Facts(
    rank=0,
    host="node0",
    versions={"torch": "2.13.0", "DeepSpeed": "0.19.8"},
    code="a" * 64,
    config=CONFIG,
    devices=["A processor, 2 cores, 24 GiB"],
    interfaces=[],
    taken={},
    variables={"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
    faults=[],
)


def _told(last: Facts) -> str:
    """Of four ranks of which the last one is different."""
    ranks = [replace(ONE, rank=rank) for rank in range(3)]
    return told(compared([*ranks, replace(last, rank=3)]))


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([4], "rank 4"), ([0, 1, 2, 3], "ranks 0-3"), ([7, 0, 2, 1], "ranks 0-2, 7")],
)
def test_ranks_are_named_in_runs(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text


def test_equal_ranks_have_no_fault() -> None:
    assert _told(replace(ONE, host="node1")) == "No fault found"


def test_nodes_may_have_interfaces_of_other_names_and_more_memory() -> None:
    other = {**ONE.variables, "GLOO_SOCKET_IFNAME": "eno1"}
    devices = ["A processor, 2 cores, 23 GiB"]
    assert _told(replace(ONE, variables=other, devices=devices)) == "No fault found"


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (
            replace(ONE, versions={"torch": "2.13.0", "DeepSpeed": "0.19.7"}),
            "DeepSpeed differs between ranks: 0.19.8 on ranks 0-2; 0.19.7 on rank 3",
        ),
        (
            replace(ONE, versions={**ONE.versions, "Apex": "0.1"}),
            "Apex differs between ranks: - on ranks 0-2; 0.1 on rank 3",
        ),
        (
            replace(ONE, code="b" * 64),
            "the code differs between ranks: aaaaaaaaaaaa on ranks 0-2; bbbbbbbbbbbb on rank 3",
        ),
        (
            replace(ONE, config=CONFIG | {"training.learning_rate": "1.0"}),
            f"the config's training.learning_rate differs between ranks: "
            f"{CONFIG['training.learning_rate']} on ranks 0-2; 1.0 on rank 3",
        ),
        (
            replace(ONE, config={MISTAKE: "cannot read the config"}),
            "the config's file differs between ranks: can be read on ranks 0-2; cannot read",
        ),
        (
            replace(ONE, variables={**ONE.variables, "NCCL_ALGO": "Ring"}),
            "NCCL_ALGO differs between ranks: unset on ranks 0-2; Ring on rank 3",
        ),
        (
            replace(ONE, devices=["Another processor, 2 cores, 24 GiB"]),
            "the device differs between ranks: A processor on ranks 0-2; Another processor on rank",
        ),
    ],
)
def test_a_rank_that_is_different_is_named(last: Facts, expected: str) -> None:
    assert expected in _told(last)


def test_a_config_that_one_rank_cannot_read_is_one_fault() -> None:
    found = compared([ONE, replace(ONE, rank=1, config={MISTAKE: "cannot read the config"})])
    assert len(found) == 1


def test_faults_of_several_ranks_are_told_once() -> None:
    fault = Fault("too hot", "open a window")
    ranks = [replace(ONE, rank=rank, faults=[fault] if rank != 1 else []) for rank in range(4)]
    assert told(compared(ranks)) == "1 fault\n- ranks 0, 2-3: too hot\n  open a window"
