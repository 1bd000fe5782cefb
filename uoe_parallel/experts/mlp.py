"""UoME: the feed-forward block as a union of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.experts.activation import GatedActivation, activate, is_gated
from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.backends import Backend
from uoe_parallel.experts.cache import KeyValueCache
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.slices import (
    InitMethod,
    SlicedColumnParallelLinear,
    SlicedRowParallelLinear,
)
from uoe_parallel.parallel.random import recompute_between
from uoe_parallel.parallel.sharding import gather_full, load_full


@dataclass(frozen=True)
class DenseMLPWeights:
    """A dense feed-forward block: y = act(x up^T + b) down^T + output_bias.

    With SwiGLU, y = (silu(x gate^T) * (x up^T)) down^T.
    """

    up_FD: Tensor
    down_DF: Tensor
    gate_FD: Tensor | None = None
    up_bias_F: Tensor | None = None
    gate_bias_F: Tensor | None = None
    output_bias_D: Tensor | None = None


class UnionOfMLPExperts(nn.Module):
    """n equal slices of one feed-forward block, spread over the tensor group.

    E_i(x) = act(x W1_i + b1_i) W2_i; the sum over all i plus the output bias is the dense block
    (arXiv 2503.02495, section 3). With SwiGLU, expert i's slice of `fc1` holds its gate columns
    and then its up columns, so that any whole number of experts is one contiguous shard.

    With `recompute`, the dense block keeps nothing between its linears but what `fc1` makes.

    Raises nothing of its own: sizes are checked with the config.
    """

    needs_all_rows = False

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        *,
        activation: str,
        bias: bool,
        backend: Backend,
        config: ModelParallelConfig,
        fc1_init: InitMethod,
        fc2_init: InitMethod,
        group: ProcessGroup,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        assert ffn_size % num_experts == 0 and num_experts % group.size() == 0
        self.num_experts = num_experts
        self.activation = activation
        self.gated = is_gated(activation)
        self.expert_width = ffn_size // num_experts
        self.backend = backend
        self.recompute = recompute
        self.group = group
        self.fc1 = SlicedColumnParallelLinear(
            hidden_size,
            ffn_size * (2 if self.gated else 1),
            num_experts,
            bias=bias,
            config=config,
            init_method=fc1_init,
            group=group,
        )
        self.fc2 = SlicedRowParallelLinear(
            ffn_size,
            hidden_size,
            num_experts,
            bias=bias,
            config=config,
            init_method=fc2_init,
            group=group,
        )

    @property
    def output_bias(self) -> Tensor | None:
        """The block's one bias [D], added once, outside routing."""
        return self.fc2.bias

    def forward(
        self,
        x: Tensor,
        gates_N: Tensor | None = None,
        assignment: Assignment | None = None,
        *,
        documents: Documents | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The dense block without its output bias, or the routed sum of this rank's experts.

        Dense: x [S or S/P, B, D] to the same shape. Routed: x [R, D] with fp32 `gates_N` to
        [R, D], each row the gated sum of its pairs' results. What else is in a token's document
        makes no difference, so there is nothing to keep of it either.
        """
        if assignment is None or gates_N is None:
            hidden = self.fc1(x)
            if self.recompute:
                return recompute_between(self._activate, self.fc2, hidden)
            return self.fc2(self._activate(hidden))
        counts_E = assignment.expert_counts_E
        hidden_NF = self.fc1(assignment.gather(x), counts_E, self.backend)
        # A gate on the narrow hidden row is the gate on the wide result: fc2 is linear.
        gated_NF = GatedActivation.apply(hidden_NF, gates_N, self.activation)
        return self.fc2(gated_NF, assignment, self.backend)

    def _activate(self, hidden: Tensor) -> Tensor:
        """Of the dense block: [..., width of `fc1`] to [..., width of `fc2`], on this rank."""
        by_expert = hidden.unflatten(-1, (-1, self.expert_width * (2 if self.gated else 1)))
        return activate(by_expert, self.activation).flatten(-2)

    def load_dense(self, dense: DenseMLPWeights) -> None:
        """Take this rank's slices of full dense weights."""
        assert (dense.gate_FD is not None) == self.gated
        fc1 = self._join(dense.gate_FD, dense.up_FD)
        load_full(self.fc1.weight, fc1, self.group)
        load_full(self.fc2.weight, dense.down_DF, self.group)
        if self.fc1.bias is not None:
            assert dense.up_bias_F is not None and dense.output_bias_D is not None
            load_full(self.fc1.bias, self._join(dense.gate_bias_F, dense.up_bias_F), self.group)
            load_full(self.fc2.bias, dense.output_bias_D, self.group)

    def to_dense(self) -> DenseMLPWeights:
        """The full dense weights, on every rank. Collective over the tensor group."""
        gate, up = self._part(gather_full(self.fc1.weight, self.group))
        weights = DenseMLPWeights(
            up_FD=up, gate_FD=gate, down_DF=gather_full(self.fc2.weight, self.group)
        )
        if self.fc1.bias is None:
            return weights
        gate_bias, up_bias = self._part(gather_full(self.fc1.bias, self.group))
        return DenseMLPWeights(
            up_FD=weights.up_FD,
            gate_FD=weights.gate_FD,
            down_DF=weights.down_DF,
            up_bias_F=up_bias,
            gate_bias_F=gate_bias,
            output_bias_D=gather_full(self.fc2.bias, self.group),
        )

    def _join(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Dense gate and up, [F, ...] each, to fc1's order."""
        if gate is None:
            return up
        parts = [x.unflatten(0, (self.num_experts, self.expert_width)) for x in (gate, up)]
        return torch.stack(parts, dim=1).flatten(0, 2)

    def _part(self, fc1: Tensor) -> tuple[Tensor | None, Tensor]:
        """The inverse of `_join`."""
        if not self.gated:
            return None, fc1
        gate, up = fc1.unflatten(0, (self.num_experts, 2, self.expert_width)).unbind(1)
        return gate.flatten(0, 1), up.flatten(0, 1)
