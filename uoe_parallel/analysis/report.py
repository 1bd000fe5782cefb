"""A simulated rank in tables for people and as JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from uoe_parallel.analysis.simulate import ParameterPlace, Simulation
from uoe_parallel.analysis.transfer import Transfer

LOG_FILE_WIDTH = 160
"""Columns that tables may use where there is no terminal to fit."""


def simulation_as_json(simulation: Simulation) -> dict[str, Any]:
    """All of it in JSON's types; sizes are bytes, shapes and offsets count elements."""
    layers = simulation.layers
    return asdict(simulation) | {
        "layout": asdict(simulation.layout) | {"name": str(simulation.layout)},
        "layers": list(layers),
        "groups": {name: list(ranks) for name, ranks in simulation.groups.items()},
    }


def print_simulation(simulation: Simulation, stream: TextIO | None = None) -> None:
    """Tables on `stream` or standard output, without control codes where that is no terminal."""
    console = plain_console(stream)
    layout, layers = simulation.layout, simulation.layers
    console.print(
        f"Rank {simulation.rank} of {layout.world_size}, {layout}: layers {layers.start} to "
        f"{layers.stop - 1}, {len(simulation.parameters)} parameters"
    )
    for table in (
        _groups(simulation),
        _parameters(simulation.parameters),
        _states(simulation),
        _traffic(simulation),
    ):
        console.print()
        console.print(table)


def plain_console(stream: TextIO | None = None) -> Console:
    """On `stream` or standard output, without control codes where that is no terminal."""
    file = sys.stdout if stream is None else stream
    terminal = file.isatty()
    width = None if terminal else LOG_FILE_WIDTH
    return Console(file=file, force_terminal=terminal, highlight=False, width=width)


def plain_table(title: str, header: str, rows: Iterable[Sequence[str]]) -> Table:
    """`header`: titles of columns, those of numbers in capitals."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in header.split(", "):
        table.add_column(
            column.lower(), justify="right" if column.isupper() else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    return table


def _groups(simulation: Simulation) -> Table:
    rows = [
        (name, str(len(ranks)), str(ranks.index(simulation.rank)), _few(ranks))
        for name, ranks in simulation.groups.items()
        if len(ranks) > 1
    ]
    return plain_table("Groups", "group, RANKS, PLACE, which", rows)


def _few(ranks: Sequence[int]) -> str:
    """`0, 8, 16, ... 504`"""
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:3]))}, ... {ranks[-1]}"


def _parameters(places: Iterable[ParameterPlace]) -> Table:
    rows = [
        (
            place.name,
            _shape(place.shard.shape),
            _shape(place.shard.global_shape),
            ", ".join(map(str, place.shard.offsets)),
            place.cut_over or "-",
            place.reduced_over,
        )
        for place in places
    ]
    header = "parameter, here, of, at, cut over, averaged over"
    return plain_table("Parameters", header, rows)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _states(simulation: Simulation) -> Table:
    states = simulation.states
    rows = [(name, in_bytes(size)) for name, size in asdict(states).items()]
    return plain_table(
        "Held between steps", "state, SIZE", [*rows, ("total", in_bytes(states.total))]
    )


def _traffic(simulation: Simulation) -> Table:
    def row(transfer: Transfer) -> Sequence[str]:
        return (
            transfer.purpose,
            transfer.phase,
            transfer.group,
            transfer.operation,
            f"{transfer.calls:,}",
            in_bytes(transfer.payload),
            in_bytes(transfer.kept) if transfer.kept else "",
        )

    header = "purpose, phase, group, operation, CALLS, PAYLOAD, OF IT TO ITSELF"
    return plain_table(
        "Put into collectives in an optimizer step", header, map(row, simulation.traffic)
    )


def in_bytes(size: float) -> str:
    """`size` bytes with a binary prefix, such as "1.50 MiB"."""
    for prefix in ("", "Ki", "Mi", "Gi"):
        if size < 1024:
            return f"{size:.2f} {prefix}B" if prefix else f"{size:.0f} B"
        size /= 1024
    return f"{size:,.2f} TiB"
