"""What is timed against what: this project's layers, and the interface of everybody's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from uoe_parallel.benchmark.problem import Problem
from uoe_parallel.benchmark.session import Session
from uoe_parallel.experts.mlp import DenseMLPWeights, UnionOfMLPExperts
from uoe_parallel.model.block import DenseBlock, RoutedBlock

OURS = "this project"
DENSE = "dense, same active width"
FULL = "dense, full width"
BALANCE_LOSS = 0.01
Z_LOSS = 0.001
"""Weights of the losses that the others keep their routers even with, as in this project."""


class Contender(ABC):
    """A layer that computes a `Problem` on this rank's tokens."""

    is_routed = True
    drops_pairs = False
    """Whether experts leave out what is beyond a capacity."""

    def __init__(self, name: str, problem: Problem, layer: nn.Module) -> None:
        self.name = name
        self.problem = problem
        self.layer = layer
        self.pairs_per_token = problem.sizes.top_k

    @abstractmethod
    def forward(self) -> tuple[Tensor, ...]:
        """The output [S/P, B, D], and what has to be sent backward beside it."""

    @abstractmethod
    def gates(self) -> Tensor:
        """[T, n]: what an expert's result for a token is multiplied by, 0 where it has none.
        Collective."""

    @abstractmethod
    def rows(self) -> int:
        """(token, expert) pairs and padding that this rank's experts computed in the last run, or
        its share where each pair is computed by all ranks together. Collective."""

    def environment(self) -> AbstractContextManager[object]:
        """What the layer needs around it."""
        return nullcontext()

    def run(self) -> Tensor:
        """Forward and backward, beginning without gradients; the output. Collective."""
        self.layer.zero_grad()
        self.problem.x_SBD.grad = None
        with self.environment():
            y, *losses = self.forward()
            torch.autograd.backward([y, *losses], [self.problem.upstream_SBD, *map(_one, losses)])
        return y.detach()


def _one(loss: Tensor) -> Tensor:
    return torch.ones_like(loss)


@dataclass(frozen=True)
class Foreign:
    """Another library's layer, which may not build or run with the version that is installed."""

    name: str
    library: str
    """The name of its distribution."""
    build: Callable[[Session, Problem], Contender]


class RoutedContender(Contender):
    """This project's routed block. Sequence-parallel all-to-all on several ranks."""

    def __init__(self, session: Session, problem: Problem) -> None:
        block = session.feed_forward(problem.sizes, routed=True)
        assert isinstance(block, RoutedBlock)
        super().__init__(OURS, problem, block)
        self.block = block
        self.context = session.context(problem.sizes)
        _load(block, problem, problem.sizes.experts)
        with torch.no_grad():
            block.get_parameter("router_weight").copy_(problem.router_ED)

    def forward(self) -> tuple[Tensor, ...]:
        return (self.block(self.problem.x_SBD, self.context),)

    @torch.no_grad()
    def gates(self) -> Tensor:
        masks: list[Tensor] = []

        def record(mask_SBE: Tensor, /) -> Tensor:
            masks.append(mask_SBE)
            return mask_SBE

        self.block.tape = record
        self.block(self.problem.x_SBD, self.context)
        self.block.tape = None
        [mask_SBE] = masks
        return mask_SBE.flatten(0, 1) * 2 * self.problem.scores().sigmoid()

    def rows(self) -> int:
        return int((self.gates() > 0).sum())


class DenseContender(Contender):
    """Megatron's column- and row-parallel linears around an activation: the first `num_slices`
    experts, of which every token visits all."""

    is_routed = False

    def __init__(self, name: str, session: Session, problem: Problem, num_slices: int) -> None:
        sizes = problem.sizes
        # Ranks share its width evenly, however many slices that is.
        dense = replace(
            sizes,
            ffn=num_slices * sizes.expert_ffn,
            experts=session.groups.tensor.size(),
            top_k=1,
        )
        self.block = session.feed_forward(dense, routed=False)
        super().__init__(name, problem, self.block)
        self.pairs_per_token = num_slices
        self.context = session.context(dense)
        _load(self.block, problem, num_slices)

    @classmethod
    def of_active_width(cls, session: Session, problem: Problem) -> DenseContender:
        return cls(DENSE, session, problem, problem.sizes.top_k)

    @classmethod
    def of_full_width(cls, session: Session, problem: Problem) -> DenseContender:
        return cls(FULL, session, problem, problem.sizes.experts)

    def forward(self) -> tuple[Tensor, ...]:
        return (self.block(self.problem.x_SBD, self.context),)

    def gates(self) -> Tensor:
        gates_TE = torch.zeros(self.problem.x_TD.shape[0], self.problem.sizes.experts)
        gates_TE[:, : self.pairs_per_token] = 1
        return gates_TE.to(self.problem.x_SBD.device)

    def rows(self) -> int:
        return self.problem.x_TD.shape[0] * self.pairs_per_token


def _load(block: DenseBlock, problem: Problem, num_slices: int) -> None:
    experts = block.experts
    assert isinstance(experts, UnionOfMLPExperts)
    up_FD = problem.up_EFD[:num_slices].flatten(0, 1)
    down_DF = problem.down_EDF[:num_slices].transpose(0, 1).flatten(1, 2)
    experts.load_dense(DenseMLPWeights(up_FD=up_FD, down_DF=down_DF))
