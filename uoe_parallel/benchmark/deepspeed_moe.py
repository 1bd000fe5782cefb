"""DeepSpeed's MoE layer, which pads all experts to one number of rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uoe_parallel.benchmark.contenders import BALANCE_LOSS, Contender, Foreign
from uoe_parallel.benchmark.problem import Problem
from uoe_parallel.benchmark.session import DTYPE, Session

NAMES = {None: "DeepSpeed MoE, dropless", 1.0: "DeepSpeed MoE, capacity 1.0"}
"""By capacity factor."""


class DeepSpeedContender(Contender):
    """Experts are spread over all ranks, each of which has tokens of its own.

    What is random in its gating (the second expert, the order in which a capacity is filled) is
    switched off: all contenders visit the same experts.
    """

    def __init__(self, capacity: float | None, session: Session, problem: Problem) -> None:
        super().__init__(NAMES[capacity], problem, _build(capacity, session, problem))
        self.drops_pairs = capacity is not None
        self.moe: Any = self.layer.deepspeed_moe
        self._rows = 0
        self.moe.experts.register_forward_pre_hook(self._count)

    def forward(self) -> tuple[Tensor, ...]:
        y_SBD, balance_loss, _ = self.layer(self.problem.x_SBD)
        return y_SBD, BALANCE_LOSS * balance_loss

    @torch.no_grad()
    def gates(self) -> Tensor:
        _, _, _, expert_kT, _, gate_kT, _ = self.moe.gate(self.problem.x_TD, None, True)
        gates_TE = gate_kT.new_zeros(gate_kT.shape[1], self.problem.sizes.experts)
        # A pair that is dropped has the expert -1 and the gate 0.
        return gates_TE.scatter_add(1, expert_kT.T.long().clamp(min=0), gate_kT.T)

    def rows(self) -> int:
        return self._rows

    def _count(self, experts: object, arguments: tuple[Tensor]) -> None:
        self._rows = arguments[0][..., 0].numel()


def _build(capacity: float | None, session: Session, problem: Problem) -> nn.Module:
    from deepspeed.moe.layer import MoE

    sizes, group = problem.sizes, session.groups.tensor
    expert = nn.Sequential(
        nn.Linear(sizes.hidden, sizes.expert_ffn, bias=False, dtype=DTYPE),
        nn.GELU(),
        nn.Linear(sizes.expert_ffn, sizes.hidden, bias=False, dtype=DTYPE),
    )
    layer: Any = MoE(
        sizes.hidden,
        expert,
        num_experts=sizes.experts,
        ep_size=group.size(),
        k=sizes.top_k,
        capacity_factor=capacity or 1.0,
        drop_tokens=capacity is not None,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    ).to(session.device.torch_device)
    layer.set_deepspeed_parallelism()
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    first = group.rank() * len(experts)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(problem.router_ED)
        for number, (up, _, down) in enumerate(experts, start=first):
            up.weight.copy_(problem.up_EFD[number])
            down.weight.copy_(problem.down_EDF[number])
    return layer


DROPLESS, CAPACITY_1 = (
    Foreign(name, "deepspeed", partial(DeepSpeedContender, capacity))
    for capacity, name in NAMES.items()
)
