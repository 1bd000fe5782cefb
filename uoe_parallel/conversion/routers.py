"""Routers that begin by choosing the experts that a token needs most.

An expert matters to a token by the norm of what it adds to the token's hidden state. That is
computed for sample text, and a ridge regression from the router's input predicts how far above or
below the token's mean each expert is: leaving out those with the lowest scores then changes least.

Shape suffixes: S positions, B sequences, T = S x B tokens, E experts, D model width, F inner width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.experts.slices import SlicedRowParallelLinear

UnionOfExperts = UnionOfMLPExperts | SelectiveMultiHeadAttention

SCORE_SIZE = 0.1
"""Root mean square of scores on the sample: gates of 2 sigmoid(s) then lie within about 5 % of one,
and the experts that are chosen add what they added to the dense block. Ranks don't depend on it."""

_RIDGE = 0.01
"""Penalty of the regression, relative to the mean square of the inputs."""


def output_linear(experts: UnionOfExperts) -> SlicedRowParallelLinear:
    """The second linear, whose slices turn what an expert computed into its result."""
    return experts.fc2 if isinstance(experts, UnionOfMLPExperts) else experts.output


def inner_activity(experts: UnionOfExperts, x_SBD: Tensor) -> Tensor:
    """What the dense block feeds to its second linear, expert after expert: [T, F]."""
    with captured_input(output_linear(experts)) as seen:
        length, batch = x_SBD.shape[:2]
        experts(x_SBD, documents=Documents.whole(length, batch, x_SBD.device))
    [inner_SBF] = seen
    return inner_SBF.flatten(0, 1)


def contributions(experts: UnionOfExperts, x_SBD: Tensor) -> Tensor:
    """The norm of each expert's result for each token: [T, E]."""
    linear = output_linear(experts)
    inner_ETK = inner_activity(experts, x_SBD).unflatten(1, (experts.num_experts, -1)).unbind(1)
    slice_EDK = linear.slices(linear.weight)
    norms = [(k @ d.t()).norm(dim=1) for k, d in zip(inner_ETK, slice_EDK, strict=True)]
    return torch.stack(norms, dim=1)


@torch.no_grad()
def fit_router(experts: UnionOfExperts, inputs: Sequence[Tensor]) -> Tensor:
    """Weights of a router for all experts, [E, D] of the inputs' dtype. inputs: of the block, of
    whole documents, [S, B, D] each."""
    width = inputs[0].shape[-1]
    gram_DD = inputs[0].new_zeros(width, width, dtype=torch.float64)
    cross_DE = gram_DD.new_zeros(width, experts.num_experts)
    for x_SBD in inputs:
        norm_TE = contributions(experts, x_SBD).double()
        mean_T1 = norm_TE.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        x_TD = x_SBD.flatten(0, 1).double()
        gram_DD += x_TD.t() @ x_TD
        cross_DE += x_TD.t() @ (norm_TE / mean_T1 - 1)
    penalty_D = (_RIDGE * gram_DD.diagonal().mean()).expand(width)
    weight_DE = torch.linalg.solve(gram_DD + penalty_D.diag(), cross_DE)
    tokens = sum(x_SBD.shape[0] * x_SBD.shape[1] for x_SBD in inputs)
    squares = (weight_DE * (gram_DD @ weight_DE)).sum() / (tokens * experts.num_experts)
    size = squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (weight_DE * (SCORE_SIZE / size)).t().to(inputs[0].dtype)


@contextmanager
def captured_input(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What the module is given in each call within the block."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        hook.remove()
