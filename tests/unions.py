"""Small routed blocks with known weights and routing: on ranks, and by reference.

A `Problem` is a recipe that pickles: every process makes the same full tensors from it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import reference
from uoe_parallel.dispatch.dispatcher import Experts, run_gathered, run_replicated, run_sharded
from uoe_parallel.experts.attention import DenseAttentionWeights, SelectiveMultiHeadAttention
from uoe_parallel.experts.backends import Backend, LoopBackend
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.mlp import DenseMLPWeights, UnionOfMLPExperts
from uoe_parallel.model.block import DenseBlock
from uoe_parallel.model.context import Context, micro_batch_context
from uoe_parallel.parallel.comm import sum_over
from uoe_parallel.parallel.groups import ParallelGroups, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.megatron import megatron_config
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.parallel.sharding import partition_dim
from uoe_parallel.routing.router import Routing

Weights = DenseMLPWeights | DenseAttentionWeights
Outcome = dict[str, Tensor]
"""`y`, and gradients under the names of what they belong to: x, gates and dense weights."""

ROPE_BASE = 100.0
"""Small, so that a few positions turn every pair of features visibly."""
BY_TOKEN = ("y", "x", "gates")


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward block. Expert widths are odd: nothing may rest on alignment."""

    num_experts: int = 4
    activation: str = "gelu"
    bias: bool = True
    hidden_size: int = 6
    expert_width: int = 3

    def weights(self, generator: torch.Generator) -> DenseMLPWeights:
        d, f = self.hidden_size, self.num_experts * self.expert_width
        gated, bias = self.activation == "swiglu", self.bias
        return DenseMLPWeights(
            up_FD=_matrix(generator, f, d),
            down_DF=_matrix(generator, d, f),
            gate_FD=_matrix(generator, f, d) if gated else None,
            up_bias_F=normal(generator, f) if bias else None,
            gate_bias_F=normal(generator, f) if bias and gated else None,
            output_bias_D=normal(generator, d) if bias else None,
        )

    def dense(self, x: Tensor, ids: Tensor, w: Weights) -> Tensor:
        assert isinstance(w, DenseMLPWeights)
        return reference.dense_mlp(x, w, self.activation)

    def routed(self, x: Tensor, ids: Tensor, mask: Tensor, gates: Tensor, w: Weights) -> Tensor:
        assert isinstance(w, DenseMLPWeights)
        return reference.routed_mlp(x, mask, gates, w, self.activation)

    def build(
        self, groups: ParallelGroups, dtype: torch.dtype, backend: Backend
    ) -> UnionOfMLPExperts:
        return UnionOfMLPExperts(
            self.hidden_size,
            self.num_experts * self.expert_width,
            self.num_experts,
            activation=self.activation,
            bias=self.bias,
            backend=backend,
            config=megatron_config(groups.layout, dtype),
            fc1_init=nn.init.zeros_,
            fc2_init=nn.init.zeros_,
            group=groups.expert,
        )


@dataclass(frozen=True)
class AttentionSpec:
    """An attention block of `num_experts` key/value heads."""

    num_experts: int = 4
    queries_per_expert: int = 1
    bias: bool = True
    head_width: int = 4
    causal: bool = True
    keys_and_values: Literal["selected", "all"] = "selected"
    rope_base: float | None = ROPE_BASE

    @property
    def hidden_size(self) -> int:
        return self.num_experts * self.queries_per_expert * self.head_width

    def weights(self, generator: torch.Generator) -> DenseAttentionWeights:
        a, c = self.hidden_size, self.num_experts * self.head_width
        bias = self.bias
        return DenseAttentionWeights(
            q_AD=_matrix(generator, a, a),
            k_CD=_matrix(generator, c, a),
            v_CD=_matrix(generator, c, a),
            output_DA=_matrix(generator, a, a),
            q_bias_A=normal(generator, a) if bias else None,
            k_bias_C=normal(generator, c) if bias else None,
            v_bias_C=normal(generator, c) if bias else None,
            output_bias_D=normal(generator, a) if bias else None,
        )

    def dense(self, x: Tensor, ids: Tensor, w: Weights) -> Tensor:
        assert isinstance(w, DenseAttentionWeights)
        return reference.dense_attention(x, ids, w, self.head_width, self.rope_base, self.causal)

    def routed(self, x: Tensor, ids: Tensor, mask: Tensor, gates: Tensor, w: Weights) -> Tensor:
        assert isinstance(w, DenseAttentionWeights)
        how = (self.head_width, self.rope_base, self.causal, self.keys_and_values == "all")
        return reference.routed_attention(x, ids, mask, gates, w, *how)

    def build(
        self, groups: ParallelGroups, dtype: torch.dtype, backend: Backend
    ) -> SelectiveMultiHeadAttention:
        return SelectiveMultiHeadAttention(
            self.hidden_size,
            self.num_experts * self.queries_per_expert,
            self.num_experts,
            rope_base=self.rope_base,
            causal=self.causal,
            keys_and_values=self.keys_and_values,
            bias=self.bias,
            backend=backend,
            config=megatron_config(groups.layout, dtype),
            qkv_init=nn.init.zeros_,
            output_init=nn.init.zeros_,
            group=groups.expert,
        )


Spec = MLPSpec | AttentionSpec


@dataclass(frozen=True)
class Problem:
    """A block, its input, a routing and the gradient that comes in from above.

    A token of the s-th equal stretch of the sequence visits expert i with probability
    stretch_density[s] * expert_density[i], so that with a stretch per rank and zeros among the
    densities a rank sends nothing, or a rank's experts receive nothing. If `packed`, sequences hold
    several documents and padding, otherwise one document each.
    """

    spec: Spec
    length: int
    batch: int
    stretch_density: tuple[float, ...]
    expert_density: tuple[float, ...]
    seed: int = 0
    packed: bool = False

    def __post_init__(self) -> None:
        assert self.length % len(self.stretch_density) == 0
        assert len(self.expert_density) == self.spec.num_experts

    def tensors(self, dtype: torch.dtype = torch.float64) -> ProblemTensors:
        generator = torch.Generator().manual_seed(self.seed)
        tokens = (self.length, self.batch)
        stretch = torch.tensor(self.stretch_density).repeat_interleave(
            self.length // len(self.stretch_density)
        )
        density = stretch.view(-1, 1, 1) * torch.tensor(self.expert_density)
        chance = torch.rand(*tokens, self.spec.num_experts, generator=generator)
        ids = self._ids()
        real = (ids >= 0).t().unsqueeze(-1)
        made = ProblemTensors(
            x=normal(generator, *tokens, self.spec.hidden_size),
            ids=ids,
            mask=(chance < density) & real,
            gates=normal(generator, *tokens, self.spec.num_experts),
            upstream=normal(generator, *tokens, self.spec.hidden_size),
            weights=self.spec.weights(generator),
        )
        return made if dtype is torch.float64 else made.to(dtype)

    def _ids(self) -> Tensor:
        shape = (self.batch, self.length)
        if not self.packed:
            return torch.zeros(shape, dtype=torch.int64)
        generator = torch.Generator().manual_seed(self.seed)
        ids = (torch.rand(shape, generator=generator) < 0.3).cumsum(1)
        padding = torch.rand(self.batch, self.length + 1, generator=generator) < 0.2
        return ids.masked_fill(padding.gather(1, ids), -1)

    def context(self, groups: ParallelGroups) -> Context:
        """What this rank's layers know of the documents. Collective."""
        ids = self._ids()
        if groups.layout.has_wide_experts:
            ids = ids.chunk(groups.layout.data)[groups.data_rank]
        shape, device = (ids.shape[0], ids.shape[1]), ids.device
        return micro_batch_context(shape, ids if self.packed else None, groups, device)


@dataclass(frozen=True)
class ProblemTensors:
    """Full tensors of a problem, S first."""

    x: Tensor
    ids: Tensor
    """[B, S]."""
    mask: Tensor
    gates: Tensor
    upstream: Tensor
    weights: Weights

    def to(self, dtype: torch.dtype) -> ProblemTensors:
        named = {name: value.to(dtype) for name, value in named_weights(self.weights).items()}
        return ProblemTensors(
            x=self.x.to(dtype),
            ids=self.ids,
            mask=self.mask,
            gates=self.gates.to(dtype),
            upstream=self.upstream.to(dtype),
            weights=type(self.weights)(**named),
        )


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _matrix(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return normal(generator, rows, columns) / columns**0.5


def named_weights(weights: Weights) -> dict[str, Tensor]:
    """The weights that there are, by name."""
    named = ((field.name, getattr(weights, field.name)) for field in fields(weights))
    return {name: value for name, value in named if value is not None}


@functools.cache
def expected_routed(problem: Problem) -> Outcome:
    """Values and gradients of the reference that visits tokens and experts one by one."""
    t = problem.tensors()
    leaves = {"x": t.x, "gates": t.gates, **named_weights(t.weights)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return _outcome(problem.spec.routed(t.x, t.ids, t.mask, t.gates, t.weights), t.upstream, leaves)


@functools.cache
def expected_dense(problem: Problem) -> Outcome:
    """Values and gradients of the dense reference, which knows no experts."""
    t = problem.tensors()
    leaves = {"x": t.x, **named_weights(t.weights)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return _outcome(problem.spec.dense(t.x, t.ids, t.weights), t.upstream, leaves)


def _outcome(y: Tensor, upstream: Tensor, leaves: dict[str, Tensor]) -> Outcome:
    values = list(leaves.values())
    if y.requires_grad:
        gradients = torch.autograd.grad(y, values, upstream, materialize_grads=True)
    else:  # No token is routed, and there is no output bias.
        gradients = [torch.zeros_like(value) for value in values]
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def start(tensor: int, *, sequence_parallel: bool) -> ParallelGroups:
    """Groups of this rank's world in tensor groups of `tensor` ranks."""
    world_size = dist.get_world_size()
    return start_groups(ParallelLayout(world_size, tensor, 1, tensor, sequence_parallel, 0))


def layout_id(layout: ParallelLayout) -> str:
    """What pytest shows of a layout."""
    tokens = "sharded" if layout.sequence_parallel else "replicated"
    wide = f"-expert{layout.expert}" if layout.has_wide_experts else ""
    return f"tensor{layout.tensor}-data{layout.data}-{tokens}{wide}"


def local(full: Tensor, groups: ParallelGroups) -> Tensor:
    """This rank's tokens of [S, B, ...]: its stretch of the sequences if tokens are sharded, and
    its sequences if an expert group holds others'."""
    if groups.layout.has_wide_experts:
        assert groups.layout.expert_data == 1
        full = full.chunk(groups.layout.data, dim=1)[groups.data_rank]
    if groups.layout.sequence_parallel:
        full = full.chunk(groups.tensor.size())[groups.tensor_rank]
    return full.clone()


def build(
    problem: Problem,
    groups: ParallelGroups,
    dtype: torch.dtype = torch.float64,
    backend: Backend | None = None,
) -> UnionOfMLPExperts | SelectiveMultiHeadAttention:
    """The problem's union with this rank's part of the dense weights."""
    union = problem.spec.build(groups, dtype, backend or LoopBackend(chunk_bytes=500))
    union.load_dense(problem.tensors(dtype).weights)  # pyright: ignore[reportArgumentType]
    return union


def weight_gradients(
    union: UnionOfMLPExperts | SelectiveMultiHeadAttention, groups: ParallelGroups
) -> Outcome:
    """Gradients of the full dense weights. Overwrites the weights. Collective."""
    with torch.no_grad():
        for name, parameter in union.named_parameters():
            # None would leave a rank without experts' work out of the reduction of gradients.
            assert parameter.grad is not None, f"{name} has no gradient"
            parameter.copy_(parameter.grad)
            if groups.layout.has_wide_experts and partition_dim(parameter) is None:
                # What is whole on all ranks saw the tokens of one of them.
                parameter.copy_(sum_over(parameter, groups.data, purpose=Purpose.OTHER))
    return named_weights(union.to_dense())


def run_experts(
    x: Tensor,
    routing: Routing,
    experts: Experts,
    groups: ParallelGroups,
    documents: Documents,
    *,
    needs_all_rows: bool = False,
) -> Tensor:
    """In the parallel form that suits the layout; `documents` of the expert group's sequences."""
    layout = groups.layout
    if not layout.sequence_parallel and not layout.has_wide_experts:
        return run_replicated(x, routing, experts, groups.expert, documents)
    run = run_gathered if needs_all_rows else run_sharded
    return run(x, routing, experts, groups.expert, layout.tensor, documents)


def run_routed(
    problem: Problem,
    groups: ParallelGroups,
    dtype: torch.dtype = torch.float64,
    backend: Backend | None = None,
) -> Outcome:
    """Run the problem on this rank, values and gradients. `BY_TOKEN` are of its own tokens."""
    t = problem.tensors(dtype)
    union = build(problem, groups, dtype, backend)
    sharded = groups.layout.sequence_parallel
    block = DenseBlock(union, group=groups.tensor, sequence_parallel=sharded)
    x = local(t.x, groups).requires_grad_()
    gates = local(t.gates, groups).requires_grad_()
    documents = problem.context(groups).expert_group
    routing = Routing(local(t.mask, groups), gates)
    experts, all_rows = partial(union, documents=documents), union.needs_all_rows
    y = block.add_bias(run_experts(x, routing, experts, groups, documents, needs_all_rows=all_rows))
    y.backward(local(t.upstream, groups))
    assert x.grad is not None and gates.grad is not None
    return {"y": y.detach(), "x": x.grad, "gates": gates.grad, **weight_gradients(union, groups)}


def _assembled(parts: list[Tensor], layout: ParallelLayout) -> list[Tensor]:
    """The inverse of `local` for an expert group; copies that should be equal stay apart."""
    if layout.sequence_parallel:
        runs = range(0, len(parts), layout.tensor)
        parts = [torch.cat(parts[first : first + layout.tensor]) for first in runs]
    return [torch.cat(parts, dim=1)] if layout.has_wide_experts else parts


def assert_equal_to(
    expected: Outcome,
    outcomes: Sequence[Outcome],
    layout: ParallelLayout,
    what: object,
    *,
    rtol: float = 1e-9,
    atol: float = 1e-11,
) -> None:
    """Every expert group's outcomes, by rank, make up the expected one."""
    for first in range(0, layout.world_size, layout.expert):
        group = outcomes[first : first + layout.expert]
        for name, value in expected.items():
            found = [outcome[name] for outcome in group]
            if name in BY_TOKEN:
                found = _assembled(found, layout)
            for rank, tensor in enumerate(found, first):
                torch.testing.assert_close(
                    tensor,
                    value.to(tensor.dtype),
                    rtol=rtol,
                    atol=atol,
                    msg=lambda text, n=name, r=rank: f"{n}, rank {r}, {layout}, {what}: {text}",
                )
