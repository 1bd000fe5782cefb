"""A plan and a search in tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from uoe_parallel.analysis.memory import StepMemory
from uoe_parallel.analysis.report import in_bytes, plain_console, plain_table
from uoe_parallel.planning.plan import Plan, StagePlan
from uoe_parallel.planning.search import Search
from uoe_parallel.planning.variants import Found

ASSUMPTIONS = """\
Assumed: even routes; products at {achievable:.0%} of the peak and everything else bound by memory;
rings, trees and pairwise exchanges over links of full bandwidth; nothing hidden behind compute but
ZeRO 3's gathering; {overhead:.3g} ms of the host for a layer. planning/time.py states it all."""
_PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "dispatch", "working")


def print_plan(plan: Plan) -> None:
    """On standard output, without control codes where that is no terminal."""
    console, fullest = plain_console(), plan.fullest
    console.print(
        f"{plan.layout} on {plan.layout.world_size} x {plan.hardware.name}, {plan.precision}: "
        f"{plan.micro_batches} micro-batches a step"
    )
    tables = [
        plain_table("Model", "what, TOTAL", _model(plan)),
        plain_table(
            "Memory of the fullest device", "part, EXPECTED ROUTES, WORST ROUTES", _memory(plan)
        ),
        plain_table(
            "With another parallel.zero_stage",
            "zero stage, WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS, DEVICE NEEDS",
            [
                (
                    _choice(str(number), number == plan.layout.zero_stage),
                    *map(in_bytes, (m.weights, m.gradients, m.optimizer, m.buffers)),
                    in_bytes(plan.hardware.needed(m.peak)),
                )
                for number, m in fullest.by_zero_stage.items()
            ],
        ),
        plain_table(
            "With another training.recompute",
            "recompute, ACTIVATIONS, DISPATCH, DEVICE NEEDS",
            [
                (
                    _choice(name, name == plan.recompute),
                    *map(in_bytes, (m.activations, m.dispatch)),
                    in_bytes(plan.hardware.needed(m.peak)),
                )
                for name, m in fullest.recomputing.items()
            ],
        ),
        plain_table(
            "Sent in a step by a rank of the slowest stage",
            "purpose, phase, group, RANKS, operation, CALLS, PAYLOAD, OF IT TO ITSELF",
            _traffic(plan.slowest),
        ),
        plain_table(
            "Stages",
            "stage, RANK, LAYERS, PARAMETERS, DEVICE NEEDS, PRODUCTS, BY MEMORY, SENDING, HIDDEN, "
            "HOST, STEP'S END",
            [_stage(plan, stage) for stage in plan.stages],
        ),
        plain_table("Step", "what, ESTIMATE", _step(plan)),
    ]
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    hardware = plan.hardware
    overhead = 1e3 * hardware.layer_overhead
    console.print(ASSUMPTIONS.format(achievable=hardware.achievable, overhead=overhead))


def _choice(name: str, is_own: bool) -> str:
    return f"{name} (this run)" if is_own else name


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """All of it in JSON's types: bytes, seconds, operations."""
    return asdict(plan) | {
        "layout": asdict(plan.layout) | {"name": str(plan.layout)},
        "hardware": plan.hardware.model_dump(),
        "stages": [asdict(s) | {"layers": list(s.layers)} for s in plan.stages],
        "fullest_rank": plan.fullest.rank,
        "needed": plan.needed,
        "fits": plan.fits,
        "tokens_per_second": plan.tokens_per_second,
        "utilisation": plan.utilisation,
        "dense_equivalent": plan.dense_equivalent,
    }


def print_search(search: Search, seconds: float) -> None:
    """As `print_plan`."""
    console = plain_console()
    refused = sum(entry.count for entry in search.refused.values())
    console.print(f"{len(search.found)} layouts fit, {refused} don't ({seconds:.1f} s)")
    if search.found:
        title = f"The fastest {len(search.worst)}"
        header = "layout, MICRO-BATCH, recompute, A STEP, BUBBLE, DEVICE NEEDS, AT WORST ROUTES"
        rows = map(_found, search.found, search.worst)
        console.print()
        console.print(plain_table(title, header, rows))
    console.print()
    rows = [
        (
            f"{entry.count:,}",
            reason,
            entry.example if entry.least is None else f"{in_bytes(entry.least)} by {entry.example}",
        )
        for reason, entry in sorted(search.refused.items(), key=lambda item: -item[1].count)
    ]
    console.print(plain_table("What does not fit", "LAYOUTS, reason, least or for example", rows))


def search_as_json(search: Search) -> dict[str, Any]:
    """All layouts that fit, the fastest first, and the reasons of the others."""
    return {
        "found": [
            {
                "layout": str(found.layout),
                "parallel": found.choice.parallel.model_dump(),
                "micro_batch_size": found.choice.micro_batch_size,
                "recompute": found.choice.recompute,
                "seconds": found.time.seconds,
                "bubble": found.time.bubble,
                "needed": found.needed,
            }
            for found in search.found
        ],
        "worst": search.worst,
        "refused": {reason: asdict(entry) for reason, entry in search.refused.items()},
    }


def _model(plan: Plan) -> list[Sequence[str]]:
    counts, flops = plan.parameters, plan.flops
    return [
        ("parameters", f"{counts.total:,}"),
        ("active for a token", f"{counts.active:,}"),
        ("most on a rank", f"{max(stage.parameters for stage in plan.stages):,}"),
        ("tokens of a step", f"{plan.tokens:,}"),
        ("operations for a token", _flops(flops.routed)),
        ("of the dense twin", _flops(flops.dense_twin)),
        ("operations of a step", _flops(flops.routed * plan.tokens)),
        ("of the dense twin", _flops(flops.dense_twin * plan.tokens)),
    ]


def _memory(plan: Plan) -> list[Sequence[str]]:
    hardware, fullest = plan.hardware, plan.fullest

    def column(memory: StepMemory) -> list[int]:
        parts = [getattr(memory, part) for part in _PARTS]
        needed = hardware.needed(memory.peak)
        allowance = needed - memory.peak - hardware.reserved_memory
        return [*parts, memory.peak, allowance, hardware.reserved_memory, needed, hardware.memory]

    stage = f"zero {plan.layout.zero_stage}"
    names = [f"{part}, {stage}" if part == "optimizer" else part for part in _PARTS]
    names += ["allocated", "fragmentation allowance", "reserved", "needed", "of"]
    columns = column(fullest.memory), column(fullest.worst_memory)
    rows = [
        (name, in_bytes(expected), in_bytes(worst))
        for name, expected, worst in zip(names, *columns, strict=True)
    ]
    fits = [
        hardware.needed(m.peak) <= hardware.memory for m in (fullest.memory, fullest.worst_memory)
    ]
    verdict = ["fits" if fit else "does not fit" for fit in fits]
    return [*rows, (f"rank {fullest.rank}", *verdict)]


def _traffic(stage: StagePlan) -> list[Sequence[str]]:
    return [
        (
            t.purpose,
            t.phase,
            t.group,
            f"{stage.group_sizes[t.group]:,}",
            t.operation,
            f"{t.calls:,}",
            in_bytes(t.payload),
            in_bytes(t.kept) if t.kept else "",
        )
        for t in stage.traffic
    ]


def _stage(plan: Plan, stage: StagePlan) -> Sequence[str]:
    time = stage.time
    return (
        str(stage.stage),
        f"{stage.rank:,}",
        str(len(stage.layers)),
        f"{stage.parameters:,}",
        in_bytes(plan.hardware.needed(stage.memory.peak)),
        *map(
            _seconds,
            (time.products, time.memory, time.communication, time.hidden, time.host),
        ),
        _seconds(time.step_end),
    )


def _step(plan: Plan) -> list[Sequence[str]]:
    return [
        ("time", _seconds(plan.time.seconds)),
        ("pipeline bubble", f"{plan.time.bubble:.1%}"),
        ("tokens per second", f"{plan.tokens_per_second:,.0f}"),
        ("utilisation", f"{plan.utilisation:.1%}"),
        ("of a dense twin as fast", f"{plan.dense_equivalent:.1%}"),
    ]


def _found(found: Found, worst: int) -> Sequence[str]:
    return (
        str(found.layout),
        str(found.choice.micro_batch_size),
        found.choice.recompute,
        _seconds(found.time.seconds),
        f"{found.time.bubble:.1%}",
        in_bytes(found.needed),
        in_bytes(worst),
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _flops(number: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {prefix}FLOP"
        number /= 1000
    return f"{number:,.3g} EFLOP"
