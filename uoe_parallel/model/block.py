"""One half of a transformer block: attention or feed-forward, dense or routed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.config.schema import RoutingConfig
from uoe_parallel.dispatch.dispatcher import (
    Experts,
    run_gathered,
    run_replicated,
    run_sharded,
)
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.cache import KeyValueCache
from uoe_parallel.experts.documents import Documents
from uoe_parallel.model.context import Context
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.parallel.random import recompute
from uoe_parallel.routing.balance import Load
from uoe_parallel.routing.balance.z_loss import z_loss
from uoe_parallel.routing.level import Decision, Level, UnitScores
from uoe_parallel.routing.memory import follow, remember
from uoe_parallel.routing.router import Router, Routing
from uoe_parallel.routing.statistics import RoutingStatistics
from uoe_parallel.routing.tape import RouteTape


class Union(Protocol):
    """Experts whose union is one dense block, such as `UnionOfMLPExperts`."""

    num_experts: int
    needs_all_rows: bool
    """Whether the experts of a rank need the rows of all tokens, also of those they do not take."""

    @property
    def output_bias(self) -> Tensor | None: ...

    def __call__(
        self,
        x: Tensor,
        gates_N: Tensor | None = None,
        assignment: Assignment | None = None,
        *,
        documents: Documents,
        cache: KeyValueCache | None = None,
    ) -> Tensor: ...


class _AttachLoss(torch.autograd.Function):
    """Passes `y` on and, in backward, hands `loss` a gradient of one.

    A balance loss rides on the hidden states instead of being returned through every layer, so
    that layers keep one tensor in and one tensor out.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = (loss.shape, loss.dtype, loss.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss_like
        return grad_outputs[0], torch.ones(shape, dtype=dtype, device=device)


class DenseBlock(nn.Module):
    """The dense block: all experts of a union on, no router."""

    def __init__(self, experts: nn.Module, *, group: ProcessGroup, sequence_parallel: bool) -> None:
        super().__init__()
        self.experts = experts
        self.group = group
        self.sequence_parallel = sequence_parallel

    def forward(self, x_SBD: Tensor, context: Context) -> Tensor:
        """[S or S/P, B, D] to the same shape."""
        cache = context.cache_of(self)
        return self.add_bias(self.experts(x_SBD, documents=context.documents, cache=cache))

    def add_bias(self, y_SBD: Tensor) -> Tensor:
        """Add the union's one output bias: once, whatever the routing."""
        experts: Union = self.experts  # pyright: ignore[reportAssignmentType]
        bias = experts.output_bias
        if bias is None:
            return y_SBD
        if self.sequence_parallel:
            bias = comm.sum_gradient(bias, self.group, Purpose.REPLICATED_WEIGHTS)
        return y_SBD + bias


class RoutedBlock(DenseBlock):
    """A union of experts behind a router: scores, routing, dispatch, experts, combine.

    `experts` lie over `expert_group`: the tensor group `group`, or more ranks around it that hold
    other sequences. `loss_weight_per_sequence` turns sums of a sequence's balance losses into the
    share of the step's loss that this rank's backward pass must carry: data-parallel size / global
    batch size under gradient averaging. A `tape` sees the masks of training passes and may replace
    them. With `recompute`, what the experts compute is computed again in backward, of the rows that
    were dispatched to them.
    """

    def __init__(
        self,
        experts: nn.Module,
        routing: RoutingConfig,
        router: Router,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        router_init: Callable[[str], Callable[[Tensor], Tensor]],
        loss_weight_per_sequence: float,
        group: ProcessGroup,
        expert_group: ProcessGroup,
        data_group: ProcessGroup,
        sequence_parallel: bool,
        recompute: bool = False,
    ) -> None:
        super().__init__(experts, group=group, sequence_parallel=sequence_parallel)
        self.expert_group = expert_group
        self.data_group = data_group
        self.spreads_tokens = sequence_parallel or expert_group.size() > group.size()
        self.routing = routing
        self.router = router
        for name in router.levels:
            init = router_init(name.removesuffix("_weight"))
            weight = init(torch.empty(router.num_routed, hidden_size)).to(dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.loss_weight = loss_weight_per_sequence
        self.statistics = RoutingStatistics(router.num_routed)
        self.tape: RouteTape | None = None
        self.takes_all = False
        """Whether every token visits every expert with a gate of one, as in the dense block."""
        self.recompute = recompute

    @property
    def num_shards(self) -> int:
        """Ranks that a sequence's tokens lie over."""
        return self.group.size() if self.sequence_parallel else 1

    def forward(self, x_SBD: Tensor, context: Context) -> Tensor:
        """[S or S/P, B, D] to the same shape. Collective over the tensor and expert groups."""
        if self.takes_all:
            return self.add_bias(self._run(x_SBD, self._everything(x_SBD, context), context))
        decisions = self._decide(x_SBD, context)
        routing = self._routing(decisions, context.documents)
        y_SBD = self.add_bias(self._run(x_SBD, routing, context))
        # Also the first of two passes when a layer is recomputed: losses and statistics are the
        # second's, the only one that has a backward pass.
        if not torch.is_grad_enabled():
            return y_SBD
        return _AttachLoss.apply(y_SBD, self._losses(decisions, routing, context.documents))

    def _run(self, x_SBD: Tensor, routing: Routing, context: Context) -> Tensor:
        experts: Union = self.experts  # pyright: ignore[reportAssignmentType]
        group = self.expert_group
        if not self.spreads_tokens:
            cache = context.cache_of(self)
            replicated = self._arithmetic(context.documents, cache)
            return run_replicated(x_SBD, routing, replicated, group, context.documents)
        assert context.memory is None, "decoding has tokens on every rank"
        is_wide = group.size() > self.group.size()
        documents = context.expert_group if is_wide else context.documents
        run = run_gathered if experts.needs_all_rows else run_sharded
        spread = self._arithmetic(documents)
        return run(x_SBD, routing, spread, group, self.group.size(), documents)

    def _everything(self, x_SBD: Tensor, context: Context) -> Routing:
        shape_SBE = (*x_SBD.shape[:2], self.router.num_experts)
        precise = torch.promote_types(x_SBD.dtype, torch.float32)
        mask_SBE = self._of_text(x_SBD.new_ones(shape_SBE, dtype=torch.bool), context.documents)
        return Routing(mask_SBE, x_SBD.new_ones(shape_SBE, dtype=precise))

    def _of_text(self, mask_SBE: Tensor, documents: Documents) -> Tensor:
        """The mask of this rank's tokens without that of padding."""
        if documents.real_SB is None:
            return mask_SBE
        return mask_SBE & documents.real_SB[self._positions(documents)].unsqueeze(-1)

    def _arithmetic(self, documents: Documents, cache: KeyValueCache | None = None) -> Experts:
        """What the experts make of dispatched rows."""
        experts = partial(self.experts, documents=documents, cache=cache)
        if not self.recompute:
            return experts
        return lambda rows_RD, gates_N, assignment: recompute(
            partial(experts, assignment=assignment), rows_RD, gates_N
        )

    def _decide(self, x_SBD: Tensor, context: Context) -> list[Decision]:
        """What each level chose among what the one before it left."""
        decisions: list[Decision] = []
        for name, level in self.router.levels.items():
            weight = self.get_parameter(name)
            allowed_SBE = decisions[-1].mask_SBE if decisions else None
            if context.memory is None:
                judged = self._judge(level, weight, x_SBD, context.documents)
                decision = self._choose(level, judged, allowed_SBE)
            else:
                decision = self._decode(level, weight, x_SBD, context, allowed_SBE)
            decisions.append(decision)
        return decisions

    def _decode(
        self,
        level: Level,
        weight: Tensor,
        x_SBD: Tensor,
        context: Context,
        allowed_SBE: Tensor | None,
    ) -> Decision:
        """A decision that is remembered for the tokens that follow, or one for such a token."""
        assert context.memory is not None and self.num_shards == 1
        memory, documents = context.memory, context.documents
        token_scores_SBE = self._scores(x_SBD, weight)
        units, memories = level.units(documents), memory.of(self).levels
        if memory.is_empty:
            judged = level.summarise(token_scores_SBE, units)
            decision = self._choose(level, judged, allowed_SBE)
            memories[level] = remember(token_scores_SBE, decision, documents.last_B)
        else:
            (position_B,), (scores_BE,) = documents.position_SB, token_scores_SBE
            allowed_BE = None if allowed_SBE is None else allowed_SBE[0]
            decision, memories[level] = follow(
                level, memories[level], scores_BE, position_B, allowed_BE, units
            )
        return decision

    def _judge(
        self, level: Level, weight: Tensor, x_SBD: Tensor, documents: Documents
    ) -> UnitScores:
        """The scores of this rank's tokens' units, gathered where these reach over shards."""
        units, positions = level.units(documents), self._positions(documents)
        if self.num_shards == 1 or level.scores_lie_within(units, len(x_SBD)):
            length = level.unit_length
            if length > 1 and level.summary == "first" and documents.one_each:
                # Units lie at equal distances, and no token but the first of each counts.
                scores_SBE = self._scores(x_SBD[::length], weight)
                scores_SBE = scores_SBE.repeat_interleave(length, dim=0)
                return UnitScores(scores_SBE[: len(x_SBD)], None, units.at(positions))
            return level.summarise(self._scores(x_SBD, weight), units.at(positions))
        scores_SBE = self._scores(x_SBD, weight)
        scores_SBE = comm.gather_sequence(scores_SBE, self.group, Purpose.SCORES)
        return level.summarise(scores_SBE, units).at(positions)

    def _scores(self, x_SBD: Tensor, weight: Tensor) -> Tensor:
        """Of each of this rank's tokens by itself."""
        precise = torch.promote_types(x_SBD.dtype, torch.float32)
        # Made precise first, so that its gradient is summed before it is rounded.
        weight = weight.to(precise)
        if self.sequence_parallel:
            weight = comm.sum_gradient(weight, self.group, Purpose.REPLICATED_WEIGHTS)
        return F.linear(x_SBD.to(precise), weight)

    @torch.no_grad()
    def _choose(self, level: Level, judged: UnitScores, allowed_SBE: Tensor | None) -> Decision:
        """The choice of this rank's tokens, made of whole sequences where the rules need them."""
        choosing_SBE = level.choosing_scores(judged, allowed_SBE)
        if self.num_shards == 1 or level.chooses_by_unit:
            chosen_SBE = level.choose(choosing_SBE, judged.units, judged.known_SB)
            mask_SBE = level.limit(chosen_SBE, judged.units)
        else:
            assert judged.known_SB is None
            documents = judged.units.documents
            units, positions = level.units(documents), self._positions(documents)
            whole_SBE = comm.gather_shards(choosing_SBE, 0, self.group, Purpose.SCORES)
            whole_SBE = level.choose(whole_SBE, units, None)
            chosen_SBE = whole_SBE[positions]
            mask_SBE = level.limit(whole_SBE, units)[positions]
        return Decision(judged, choosing_SBE, chosen_SBE, mask_SBE)

    def _positions(self, documents: Documents) -> slice:
        """Of whole sequences, those that this rank holds."""
        return documents.shard(self.group.rank() % self.num_shards, self.num_shards)

    def _routing(self, decisions: list[Decision], documents: Documents) -> Routing:
        """Mask and gates of this rank's tokens over all experts. A tape may replace decisions."""
        mask_SBE = self._of_text(self.router.with_shared(decisions[-1].mask_SBE), documents)
        masks = [decision.mask_SBE for decision in decisions[:-1]]
        if self.training and self.tape is not None:
            widths = [mask.shape[-1] for mask in (*masks, mask_SBE)]
            taped = self.tape(torch.cat((*masks, mask_SBE), dim=-1))
            *masks, mask_SBE = taped.split(widths, dim=-1)
            for number, mask in enumerate(masks):
                decisions[number] = replace(decisions[number], chosen_SBE=mask, mask_SBE=mask)
        gates = [
            level.gate(decision.judged.scores_SBE, mask)
            for level, decision, mask in zip(
                self.router.levels.values(),
                decisions,
                [*masks, self.router.without_shared(mask_SBE)],
                strict=True,
            )
        ]
        return Routing(mask_SBE, self.router.with_shared(math.prod(gates[1:], start=gates[0])))

    def _losses(self, decisions: list[Decision], routing: Routing, documents: Documents) -> Tensor:
        """This rank's share of the weighted balance losses of the step; counts statistics and what
        rules learn from."""
        real_SB = documents.real_SB
        if real_SB is not None:
            real_SB = real_SB[self._positions(documents)]
        levels = self.router.levels.values()
        # A tape may have replaced what is left of the choice.
        mask_SBE = taken_SBE = self.router.without_shared(routing.mask_SBE)
        dropped_SBE = None
        if any(level.capacity is not None for level in levels):
            dropped_SBE = decisions[-1].chosen_SBE & ~decisions[-1].mask_SBE
            if real_SB is not None:
                dropped_SBE = dropped_SBE & real_SB.unsqueeze(-1)
            taken_SBE = mask_SBE | dropped_SBE
        chosen = [*(decision.chosen_SBE for decision in decisions[:-1]), taken_SBE]
        balance = z = routing.gates_SBE.new_zeros(())
        for level, decision, chosen_SBE in zip(levels, decisions, chosen, strict=True):
            level_balance, level_z = self._level_losses(level, decision.judged, chosen_SBE)
            balance, z = balance + level_balance, z + level_z
            for rule in level.running if self.training else ():
                rule.observe(decision.choosing_SBE, chosen_SBE, decision.judged.counted_SB)
        self.statistics.add(
            mask_SBE,
            self.router.without_shared(routing.gates_SBE),
            dropped_SBE,
            balance,
            z,
            documents.shape[1] / self.num_shards,
            real_SB,
        )
        return self.loss_weight * (self.routing.balance_loss * balance + self.routing.z_loss * z)

    def _level_losses(
        self, level: Level, judged: UnitScores, chosen_SBE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of a level's balance losses and of its z-loss, sums over sequences."""
        counted_SB, scores_SBE = judged.counted_SB, judged.scores_SBE
        counts_BE = (chosen_SBE & counted_SB.unsqueeze(-1)).sum(0)
        scopes = {rule.scope for rule in level.balance} - {"none"}
        if scopes and self.sequence_parallel:
            counts_BE = comm.sum_over(counts_BE, self.group, purpose=Purpose.BALANCE)
        counts = {"sequence": counts_BE}
        if "batch" in scopes:
            counts_1E = counts_BE.sum(0, keepdim=True)
            counts["batch"] = comm.sum_over(counts_1E, self.data_group, purpose=Purpose.BALANCE)
        units_B = level.units_per_sequence(level.units(judged.units.documents))
        balance = scores_SBE.new_zeros(())
        for rule in level.balance:
            if rule.scope != "none":
                taken = counts[rule.scope].to(scores_SBE.dtype)
                share = taken / taken.sum(-1, keepdim=True).clamp(min=1)
                balance = balance + rule.loss(Load(scores_SBE, counted_SB, share, units_B))
        return balance, z_loss(scores_SBE, counted_SB, units_B)
