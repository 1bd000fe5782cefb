"""Each unit takes the experts for which its score is high as scores of that expert go."""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.routing.running import Running
from uoe_parallel.routing.units import Units

_NUM_EDGES = 33


class Threshold(Running):
    """Expert i is taken where s_i > b_i, b_i following the quantile of its scores that the share
    top_k / experts of all units lies above (expert-threshold routing, arXiv 2603.11535). Where
    segments leave an expert to some units only, so many of these take it more often.

    Quantiles don't average over ranks, counts add up: a step counts each expert's scores between
    edges around its threshold, dense at the threshold and apart by the spread of the scores, and
    reads the step's quantile off their sums; beyond the edges it takes a normal distribution's.
    Thresholds are running means of these. All experts are taken in the first steps, until the
    thresholds know their scores.
    """

    per_unit = True
    looks_ahead = False
    balances = True

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        self.share = config.top_k / num_experts
        self.warmup = config.threshold_warmup
        self.rate = config.threshold_rate
        self.num_experts = num_experts
        double = torch.float64
        self.state = {
            "threshold": torch.zeros(num_experts, dtype=double),
            "spread": torch.ones(num_experts, dtype=double),
            "steps": torch.zeros(1, dtype=double),
        }
        # Of each expert: scores between edges, their sum and their sum of squares; and all units.
        self.observed = torch.zeros(num_experts * (_NUM_EDGES + 3) + 1, dtype=double)
        self.offsets_J = 4 * torch.linspace(-1, 1, _NUM_EDGES, dtype=double) ** 3

    def __call__(self, scores_SBE: Tensor, units: Units) -> Tensor:
        self.to(scores_SBE.device)
        return scores_SBE > self.in_force_E

    @property
    def in_force_E(self) -> Tensor:
        """What scores have to be above, fp64: -inf while all experts are taken."""
        takes_all = (self.state["steps"] < self.warmup) | (self.share >= 1)
        return self.state["threshold"].masked_fill(takes_all, -torch.inf)

    def observe(self, scores_SBE: Tensor, mask_SBE: Tensor, counted_SB: Tensor) -> None:
        self.to(scores_SBE.device)
        scores_ET = scores_SBE.double().flatten(0, 1).T.contiguous()
        counted_ET = counted_SB.flatten() & (scores_ET > -torch.inf)
        scores_ET = scores_ET.where(counted_ET, 0)
        cells_E, sums_E, squares_E, units = self._parts(self.observed)
        units += counted_SB.sum()
        between_ET = torch.searchsorted(self._edges(), scores_ET)
        cells_E.scatter_add_(1, between_ET, counted_ET.double())
        sums_E += scores_ET.sum(1)
        squares_E += scores_ET.square().sum(1)

    def move(self, observed: Tensor) -> None:
        cells_E, sums_E, squares_E, units = self._parts(observed)
        count_E = cells_E.sum(1)
        seen_E = count_E > 0
        # Above edge j are the scores of all cells behind it.
        above_EJ = (count_E.unsqueeze(1) - cells_E.cumsum(1))[:, :-1]
        wanted_E = (self.share * units).clamp(max=count_E)
        mean_E = sums_E / count_E.clamp(min=1)
        spread_E = (squares_E / count_E.clamp(min=1) - mean_E.square()).clamp(min=0).sqrt()
        below_E = 1 - wanted_E / count_E.clamp(min=1)
        within_E = (above_EJ[:, 0] >= wanted_E) & (above_EJ[:, -1] <= wanted_E)
        quantile_E = torch.where(
            within_E & (wanted_E < count_E),
            _crossing(self._edges(), above_EJ, wanted_E),
            mean_E + torch.special.ndtri(below_E.clamp(1e-6, 1 - 1e-6)) * spread_E,
        )
        # The mean of all steps so far, until there are enough of them to forget the first.
        rate = (1 / (self.state["steps"] + 1)).clamp(min=self.rate)
        steps = {"threshold": quantile_E, "spread": spread_E.clamp(min=1e-6)}
        for name, value_E in steps.items():
            old_E = self.state[name]
            self.state[name] = torch.where(seen_E, old_E + rate * (value_E - old_E), old_E)
        self.state["steps"] = self.state["steps"] + 1

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.offsets_J = self.offsets_J.to(device)

    def shown(self) -> dict[str, Tensor]:
        return {"threshold": self.state["threshold"]}

    def _edges(self) -> Tensor:
        """[E, J], rising."""
        threshold_E, spread_E = self.state["threshold"], self.state["spread"]
        return threshold_E.unsqueeze(1) + spread_E.unsqueeze(1) * self.offsets_J

    def _parts(self, observed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of [E, J + 1], [E], [E] and [1]."""
        cells, sums, squares, units = observed.split(
            [self.num_experts * (_NUM_EDGES + 1), self.num_experts, self.num_experts, 1]
        )
        return cells.view(self.num_experts, -1), sums, squares, units


def _crossing(edges_EJ: Tensor, above_EJ: Tensor, wanted_E: Tensor) -> Tensor:
    """Where the falling counts at the edges pass the wanted ones, straight between two edges."""
    last = edges_EJ.shape[1] - 1
    behind_E1 = (above_EJ > wanted_E.unsqueeze(1)).sum(1, keepdim=True).clamp(1, last)
    low, high = (edges_EJ.gather(1, behind_E1 - step).squeeze(1) for step in (1, 0))
    more, fewer = (above_EJ.gather(1, behind_E1 - step).squeeze(1) for step in (1, 0))
    share = ((more - wanted_E) / (more - fewer).clamp(min=1e-9)).clamp(0, 1)
    return low + share * (high - low)
