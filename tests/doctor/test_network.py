"""Interfaces, the one that is taken, and the way to the rendezvous."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

import pytest

from uoe_parallel.doctor import network
from uoe_parallel.doctor.network import (
    GLOO,
    NCCL,
    Interface,
    gloo_interface,
    interface_faults,
    interfaces,
    nccl_interface,
    rendezvous_faults,
)

LO = Interface("lo", ["127.0.0.1", "::1"], is_up=True, megabits=0)
ETH0 = Interface("eth0", ["10.0.0.5"], is_up=True, megabits=1000)
ETH1 = Interface("eth1", ["10.1.0.5"], is_up=True, megabits=25000)
DOCKER = Interface("docker0", ["172.17.0.1"], is_up=True, megabits=0)
IB0 = Interface("ib0", ["10.2.0.5"], is_up=True, megabits=200000)
ALL = [LO, DOCKER, ETH0, ETH1, IB0]


def test_the_loopback_interface_of_this_host_is_found() -> None:
    [loopback] = [one for one in interfaces() if one.is_loopback]
    assert "127.0.0.1" in loopback.addresses and loopback.is_up


@pytest.mark.parametrize(
    ("environment", "own", "name"),
    [
        ({}, ["10.1.0.5"], "eth1"),
        ({}, ["127.0.1.1"], "lo"),
        ({}, ["192.168.7.7"], "lo"),
        ({}, [], "lo"),
        ({GLOO: "eth0"}, ["10.1.0.5"], "eth0"),
        ({GLOO: "eth1,eth0"}, [], "eth1"),
        ({GLOO: "eth"}, ["10.1.0.5"], None),
    ],
)
def test_gloo_takes_the_named_interface_or_the_host_s(
    environment: Mapping[str, str], own: list[str], name: str | None
) -> None:
    assert gloo_interface(environment, ALL, own) == name


@pytest.mark.parametrize(
    ("named", "found", "name"),
    [
        (None, ALL, "ib0"),
        (None, [LO, DOCKER, ETH0, ETH1], "eth0"),
        (None, [LO, DOCKER], "docker0"),
        ("eth", ALL, "eth0"),
        ("=eth1", ALL, "eth1"),
        ("=eth", ALL, None),
        ("^docker,lo,ib", ALL, "eth0"),
        ("eno", ALL, None),
        (None, [LO, Interface("eth0", ["10.0.0.5"], is_up=False, megabits=0)], "lo"),
    ],
)
def test_nccl_takes_names_by_their_beginning(
    named: str | None, found: list[Interface], name: str | None
) -> None:
    assert nccl_interface({} if named is None else {NCCL: named}, found) == name


def _faults(
    environment: Mapping[str, str], taken: Mapping[str, str | None], *, several_nodes: bool
) -> list[str]:
    faults = interface_faults(environment, ALL, taken, several_nodes=several_nodes)
    return [f"{fault.problem}; {fault.advice}" for fault in faults]


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    [fault] = _faults({GLOO: "eth7"}, {GLOO: None}, several_nodes=False)
    assert fault.startswith("GLOO_SOCKET_IFNAME=eth7 names no interface of this node")
    assert "docker0, eth0, eth1, ib0" in fault


def test_nodes_cannot_meet_over_loopback() -> None:
    assert _faults({}, {GLOO: "lo"}, several_nodes=False) == []
    [fault] = _faults({}, {GLOO: "lo", NCCL: "eth0"}, several_nodes=True)
    assert "gloo would take the interface lo" in fault
    assert "export GLOO_SOCKET_IFNAME=NAME with one of: docker0, eth0" in fault


@pytest.fixture
def port() -> Iterator[int]:
    """A free one that stays free: bound, and nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_who_listens_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        monkeypatch.setattr(network.time, "sleep", lambda seconds: late.listen())
        assert rendezvous_faults(*late.getsockname(), several_nodes=False, wait=30) == []


def test_a_rendezvous_without_a_listener_is_named(port: int) -> None:
    [fault] = rendezvous_faults("127.0.0.1", port, several_nodes=False, wait=0)
    assert f"the rendezvous at 127.0.0.1 port {port} could not be reached in 0 s" in fault.problem
    assert "nobody listens: check MASTER_PORT" in fault.advice


def test_a_name_that_does_not_resolve_is_told(port: int) -> None:
    [fault] = rendezvous_faults("no-such-host.invalid", port, several_nodes=True, wait=0)
    assert "no-such-host.invalid" in fault.problem
    assert "the name does not resolve" in fault.advice


def test_several_nodes_do_not_meet_at_loopback(port: int) -> None:
    [fault] = rendezvous_faults("localhost", port, several_nodes=True, wait=0)
    assert fault.problem == "MASTER_ADDR is localhost, which every node takes for itself"
