"""What was found, in tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from rich.table import Table

from uoe_parallel.analysis.report import plain_console, plain_table
from uoe_parallel.doctor.certificate import Certificate, certified_code, read_certificates
from uoe_parallel.doctor.collectives import Timed
from uoe_parallel.doctor.facts import Facts
from uoe_parallel.doctor.faults import Found, ranks_text, told
from uoe_parallel.doctor.versions import installed_versions


@dataclass(frozen=True)
class Examination:
    """All that is known at the end; `facts` are of the ranks that could be asked."""

    facts: Sequence[Facts]
    found: Sequence[Found]
    layout: str = ""
    timed: Sequence[Timed] = ()

    @property
    def is_healthy(self) -> bool:
        return not self.found


def as_json(examination: Examination) -> dict[str, Any]:
    """All of it in JSON's types: seconds, and bytes a second."""
    certificates = [asdict(one) | {"outdated by": changed} for one, changed in _certificates()]
    return {
        "healthy": examination.is_healthy,
        "faults": [asdict(one) for one in examination.found],
        "layout": examination.layout,
        "ranks": [facts.to_json() for facts in examination.facts],
        "collectives": [asdict(one) for one in examination.timed],
        "certificates": certificates,
    }


def print_examination(examination: Examination, stream: TextIO | None = None) -> None:
    """On `stream` or standard output, without control codes where that is no terminal."""
    console = plain_console(stream)
    own = examination.facts[0]
    ranks = len(examination.facts)
    layout = f" as {examination.layout}" if examination.layout else ""
    console.print(
        f"{ranks} rank{'s' * (ranks > 1)}{layout}, seen from rank {own.rank} on {own.host}"
    )
    tables = [_versions(own), _nodes(examination.facts), _interfaces(own)]
    tables += [_collectives(examination.timed)] if examination.timed else []
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    console.print(told(examination.found), markup=False, soft_wrap=True)
    console.print()
    console.print(_certified())


def _versions(own: Facts) -> Table:
    return plain_table("Versions", "of, installed", own.versions.items())


def _nodes(facts: Sequence[Facts]) -> Table:
    """Hosts with the same ranks' devices in one row."""
    of: dict[str, list[Facts]] = {}
    for one in facts:
        of.setdefault(one.host, []).append(one)
    rows = [
        (
            host,
            ranks_text([one.rank for one in ranks]),
            "\n".join(ranks[0].devices),
            ", ".join(f"{backend}: {name}" for name, backend in _takers(ranks[0]).items()),
        )
        for host, ranks in of.items()
    ]
    return plain_table("Nodes", "host, which, devices, interface taken", rows)


def _takers(own: Facts) -> dict[str, str]:
    """Backends by the interfaces that they take."""
    takers: dict[str, str] = {}
    for variable, name in own.taken.items():
        backend = variable.partition("_")[0].lower()
        place = name or "none"
        takers[place] = f"{takers[place]} and {backend}" if place in takers else backend
    return takers


def _interfaces(own: Facts) -> Table:
    takers = _takers(own)
    rows = [
        (
            one["name"],
            ", ".join(one["addresses"]),
            "up" if one["is_up"] else "down",
            f"{one['megabits']:,}" if one["megabits"] else "-",
            takers.get(one["name"], ""),
        )
        for one in own.interfaces
    ]
    title = f"Interfaces of {own.host}"
    return plain_table(title, "name, addresses, state, MBIT/S, taken by", rows)


def _collectives(timed: Iterable[Timed]) -> Table:
    rows = [
        (
            one.axis,
            one.operation,
            str(one.groups),
            f"{one.seconds * 1e3:.2f} ms",
            f"{one.slowest * 1e3:.2f} ms",
            one.slowest_ranks,
            f"{one.bandwidth / 1e6:,.0f} MB/s",
        )
        for one in timed
    ]
    header = "axis, collective, GROUPS, MEDIAN, SLOWEST, of ranks, ITS BANDWIDTH"
    return plain_table("Collectives of 256 KiB a rank, alone", header, rows)


def _certificates() -> list[tuple[Certificate, list[str]]]:
    """With what has changed since each."""
    code, versions = certified_code(), installed_versions()
    return [(one, one.outdated_by(versions, code)) for one in read_certificates()]


def _certified() -> Table | str:
    rows = [
        (
            one.device,
            one.hardware,
            one.when,
            f"{one.passed:,}" + ("" if one.with_slow else " (without slow ones)"),
            _skipped(one),
            "yes" if not changed else f"no: {', '.join(changed)} changed",
        )
        for one, changed in _certificates()
    ]
    if not rows:
        return "Nothing certified here: bash tests/run.sh --device cpu|cuda"
    title = "Certified here by bash tests/run.sh --device cpu|cuda"
    return plain_table(title, "device, hardware, when, PASSED, skipped, still holds", rows)


def _skipped(certificate: Certificate) -> str:
    reasons: dict[str, int] = {}
    for area in certificate.areas.values():
        for reason, number in area.skipped.items():
            reasons[reason] = reasons.get(reason, 0) + number
    return "\n".join(f"{number}: {reason}" for reason, number in reasons.items()) or "0"
