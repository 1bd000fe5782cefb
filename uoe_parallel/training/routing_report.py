"""What every routed block did since the last report, over all ranks.

Shape suffixes: E experts of a block, J experts again, H bins of gates, L blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uoe_parallel.config.schema import RunConfig
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.agreement import broadcast_json, gather_json
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.routing.statistics import GATE_EDGES, RoutingStatistics
from uoe_parallel.training.metrics import PERCENTILES, Bars, Value, load_statistics

_DECIMALS = 6
"""Of the numbers in lists: enough for a share of a thousand experts, and short in the record."""


class RoutingReporter:
    """Built and used by every rank alike, with the routed blocks of its stage."""

    def __init__(
        self,
        blocks: dict[str, RoutedBlock],
        config: RunConfig,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        """Collective over all ranks. The drift of rules' running state (`block.router.running`) is
        counted from here."""
        self._experts = config.routed_experts
        self._blocks = blocks
        self._device = device
        self._over = [groups.data, groups.pipe]
        if groups.layout.sequence_parallel:
            self._over.append(groups.tensor)
        # What ranks hold alike enters the sum over ranks once.
        self._speaks_for_state = all(
            group.rank() == 0 for group in self._over if group is not groups.pipe
        )
        self._state = {name: _running_state(block) for name, block in blocks.items()}
        sizes = {
            name: {kind: state.numel() for kind, state in states.items()}
            for name, states in self._state.items()
        }
        gathered = gather_json(sizes, groups.world) if self._experts else []
        merged = {name: size for part in gathered for name, size in part.items()}
        self._sizes: dict[str, dict[str, int]] = (
            broadcast_json(merged, groups.world) if self._experts else {}
        )

    def report(self) -> dict[str, Value]:
        """Reduces all blocks' statistics in one collective and resets them.

        Of experts that are not shared. For each routed block "<value>/<block>", numbers:

        - `load_max_over_mean` and `load_entropy` (1 is even) of the pairs that experts took;
        - `dropped_share` of pairs; `unrouted_share` of tokens, which no expert took;
          `experts_per_token`, a mean;
        - `balance_loss` (a sequence's mean, 1 is even, of all levels and rules) and `z_loss`;
        - `<state>_drift` of a rule's running state, such as `threshold`: its mean absolute change
          since the last report;

        and lists with an entry for each expert:

        - `load`, its share of all pairs; if any were dropped `dropped`, the share of its own;
        - `partner`, the expert that most of its tokens visit too (the lowest of equals), and
          `partner_share`, the share that does. An expert that every token visits is nobody's
          partner; NaN if there is none;
        - `<state>`, a rule's running state;

        and `gate_histogram`, the shares of chosen pairs by their gate.

        Over blocks, `load_max_over_mean/<percentile>` and `load_entropy/<percentile>` for each of
        `PERCENTILES`, and `load_max_over_mean` alone, the largest. Empty without routed blocks.
        """
        if not self._experts:
            return {}
        parts = {name: self._pack(name) for name in self._experts}
        counted_X = torch.cat(list(parts.values()))
        totals_X = comm.sum_over(counted_X, *self._over, purpose=Purpose.REPORT).cpu()
        report: dict[str, Value] = {}
        sizes = [part.numel() for part in parts.values()]
        for name, total_X in zip(parts, totals_X.split(sizes), strict=True):
            states = self._sizes[name]
            rest = sum(states.values()) + len(states)
            statistics_X, state_X = total_X.split([total_X.numel() - rest, rest])
            values = _block_report(RoutingStatistics(self._experts[name], statistics_X))
            values |= _state_report(states, state_X)
            report |= {f"{value}/{name}": what for value, what in values.items()}
        return {**report, **_over_blocks(report, list(parts))}

    def forget(self) -> None:
        """The steps since the last report; drift is counted from the present state on."""
        for name, block in self._blocks.items():
            block.statistics.reset()
            self._state[name] = _running_state(block)

    def _pack(self, name: str) -> Tensor:
        """Statistics, running states and their drifts; zeros for what other ranks have to say."""
        sizes = self._sizes[name]
        silence = torch.zeros(sum(sizes.values()) + len(sizes), dtype=torch.float64)
        block = self._blocks.get(name)
        if block is None:  # of another stage
            parts = [RoutingStatistics(self._experts[name]).pack(), silence]
        else:
            parts = [block.statistics.pack()]
            block.statistics.reset()
            before, now = self._state[name], _running_state(block)
            self._state[name] = now
            drifts = [(now[kind] - before[kind]).abs().mean().view(1) for kind in sizes]
            mine = [*(now[kind] for kind in sizes), *drifts]
            parts += mine if self._speaks_for_state else [silence]
        return torch.cat([part.to(self._device) for part in parts])


def _running_state(block: RoutedBlock) -> dict[str, Tensor]:
    """By name, copies on the CPU: fp64 vectors."""
    return {
        weight.removesuffix("router_weight") + kind: state.detach().to(
            "cpu", torch.float64, copy=True
        )
        for weight, level in block.router.levels.items()
        for running in level.running
        for kind, state in running.shown().items()
    }


def _block_report(statistics: RoutingStatistics) -> dict[str, Value]:
    counts_E, dropped_E = statistics.counts_E, statistics.dropped_E
    tokens, routed, sequences, balance, z = statistics.scalars.tolist()
    pairs, dropped = float(counts_E.sum()), float(dropped_E.sum())
    max_over_mean, entropy = load_statistics(counts_E)
    partners, shares = _partners(statistics.together_EJ, routed)
    gates_H = statistics.gates_H
    report: dict[str, Value] = {
        "load_max_over_mean": float(max_over_mean),
        "load_entropy": float(entropy),
        "dropped_share": dropped / max(pairs + dropped, 1.0),
        "unrouted_share": (tokens - routed) / max(tokens, 1.0),
        "experts_per_token": pairs / max(tokens, 1.0),
        "balance_loss": balance / max(sequences, 1.0),
        "z_loss": z / max(sequences, 1.0),
        "load": Bars(_rounded(counts_E / max(pairs, 1.0))),
        "partner": partners,
        "partner_share": Bars(shares),
        "gate_histogram": Bars(_rounded(gates_H / gates_H.sum().clamp(min=1)), GATE_EDGES),
    }
    if dropped > 0:
        report["dropped"] = Bars(_rounded(dropped_E / (counts_E + dropped_E).clamp(min=1)))
    return report


def _partners(together_EJ: Tensor, routed: float) -> tuple[list[float], list[float]]:
    """Each expert's most frequent partner, and the share of its tokens that visit that one too."""
    counts_E = together_EJ.diagonal()
    other_EJ = together_EJ.clone().fill_diagonal_(0)
    other_EJ[:, counts_E == routed] = 0
    most_E, partner_E = other_EJ.max(dim=1)
    found = (most_E > 0).tolist()
    partners = [j if yes else math.nan for j, yes in zip(partner_E.tolist(), found, strict=True)]
    return partners, _rounded(most_E / counts_E.clamp(min=1))


def _state_report(sizes: dict[str, int], state_X: Tensor) -> dict[str, Value]:
    *states, drifts = state_X.split([*sizes.values(), len(sizes)])
    report: dict[str, Value] = {}
    for kind, state_E, drift in zip(sizes, states, drifts.tolist(), strict=True):
        report[kind] = _rounded(state_E)
        report[f"{kind}_drift"] = drift
    return report


def _over_blocks(report: dict[str, Value], blocks: list[str]) -> dict[str, Value]:
    points = torch.tensor(list(PERCENTILES.values()), dtype=torch.float64)
    over: dict[str, Value] = {}
    for value in ("load_max_over_mean", "load_entropy"):
        values_L = torch.tensor([report[f"{value}/{name}"] for name in blocks], dtype=points.dtype)
        found = values_L.quantile(points).tolist()
        over |= {f"{value}/{p}": v for p, v in zip(PERCENTILES, found, strict=True)}
    return {**over, "load_max_over_mean": over["load_max_over_mean/max"]}


def _rounded(values: Tensor) -> list[float]:
    return [round(value, _DECIMALS) for value in values.tolist()]
