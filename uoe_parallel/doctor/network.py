"""This node's interfaces, the one that a backend would take, and the way to the other nodes."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

from uoe_parallel.doctor.faults import Fault

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
PAUSE = 0.2
"""Seconds between attempts to reach someone."""


@dataclass(frozen=True)
class Interface:
    """A network interface of this node."""

    name: str
    addresses: Sequence[str]
    """IPv4 and IPv6, without what follows a % sign."""
    is_up: bool
    megabits: int
    """A second; 0 where the driver does not say."""

    @property
    def is_loopback(self) -> bool:
        return any(ipaddress.ip_address(address).is_loopback for address in self.addresses)


def interfaces() -> list[Interface]:
    """Those with an address, in the system's order."""
    states = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        families = (socket.AF_INET, socket.AF_INET6)
        addresses = [e.address.partition("%")[0] for e in entries if e.family in families]
        if addresses and name in states:
            state = states[name]
            found.append(Interface(name, addresses, state.isup, state.speed))
    return found


def gloo_interface(
    environment: Mapping[str, str], found: Sequence[Interface], own: Sequence[str]
) -> str | None:
    """The interface that torch gives gloo: the named one, else the one with an address that the
    host's name resolves to (`own`), else the loopback one. None if the named one is not there."""
    if named := environment.get(GLOO):
        first = named.split(",")[0]
        return first if any(one.name == first for one in found) else None
    for address in own:
        for one in found:
            # All of 127.0.0.0/8 is the loopback interface's, such as Debian's 127.0.1.1.
            loopback = ipaddress.ip_address(address).is_loopback and one.is_loopback
            if address in one.addresses or loopback:
                return one.name
    return next((one.name for one in found if one.is_loopback), None)


def nccl_interface(environment: Mapping[str, str], found: Sequence[Interface]) -> str | None:
    """The first interface that NCCL takes: of those that begin as one of the named ones ("=" for
    the whole name, "^" for all but these); unnamed, InfiniBand's, then any but Docker's and the
    loopback one, then these. None if no name fits."""
    usable = [one for one in found if one.is_up]
    if named := environment.get(NCCL):
        excluding, exact = named.startswith("^"), named.lstrip("^").startswith("=")
        names = named.lstrip("^=").split(",")

        def fits(name: str) -> bool:
            return any(name == n if exact else name.startswith(n) for n in names)

        return next((one.name for one in usable if fits(one.name) != excluding), None)

    def place(one: Interface) -> int:
        if one.is_loopback:
            return 3
        return 2 if one.name.startswith("docker") else int(not one.name.startswith("ib"))

    return min(usable, key=place).name if usable else None


def own_addresses() -> list[str]:
    """What this host's name resolves to; empty if it does not."""
    try:
        return _resolved(socket.gethostname())
    except OSError:
        return []


def _resolved(name: str) -> list[str]:
    entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return [str(address[0]).partition("%")[0] for *_, address in entries]


def interface_faults(
    environment: Mapping[str, str],
    found: Sequence[Interface],
    taken: Mapping[str, str | None],
    *,
    several_nodes: bool,
) -> Iterator[Fault]:
    """Of the interfaces `taken`, by variable."""
    names = ", ".join(one.name for one in found if not one.is_loopback) or "none but lo"
    loopback = {one.name for one in found if one.is_loopback}
    for variable, name in taken.items():
        backend = variable.partition("_")[0].lower()
        if name is None and variable in environment:
            yield Fault(
                f"{variable}={environment[variable]} names no interface of this node",
                f"name one of: {names}; or unset it",
            )
        elif several_nodes and name in loopback:
            yield Fault(
                f"{backend} would take the interface {name}, which other nodes cannot reach",
                f"export {variable}=NAME with one of: {names}",
            )


def rendezvous_faults(address: str, port: int, *, several_nodes: bool, wait: float) -> list[Fault]:
    """Why nobody can be reached at the address where ranks meet, after `wait` seconds of trying:
    who listens there may be the last to start."""
    try:
        if several_nodes and all(ipaddress.ip_address(a).is_loopback for a in _resolved(address)):
            problem = f"MASTER_ADDR is {address}, which every node takes for itself"
            return [Fault(problem, "name the first node by an address that the others reach")]
    except OSError:
        pass  # told below if it lasts
    deadline = time.monotonic() + wait
    while True:
        try:
            left = max(PAUSE, deadline - time.monotonic())
            socket.create_connection((address, port), timeout=left).close()
        except OSError as error:
            if time.monotonic() + PAUSE < deadline:
                time.sleep(PAUSE)
                continue
            return [_unreachable(address, port, wait, error)]
        return []


def _unreachable(address: str, port: int, wait: float, error: OSError) -> Fault:
    advice = {
        socket.gaierror: "the name does not resolve: check MASTER_ADDR, and this node's resolver",
        ConnectionRefusedError: "the host answers and nobody listens: check MASTER_PORT, and that "
        "the launch runs on the first node",
    }
    default = "check MASTER_ADDR, the route to it and firewalls between the nodes"
    problem = (
        f"the rendezvous at {address} port {port} could not be reached in {wait:g} s: "
        f"{error.strerror or error}"
    )
    return Fault(problem, advice.get(type(error), default))
