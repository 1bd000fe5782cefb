"""SMHA: multi-head attention whose experts are the key/value heads with their query heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.backends import Backend
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.rotary import rotate
from uoe_parallel.experts.slices import (
    InitMethod,
    SlicedColumnParallelLinear,
    SlicedRowParallelLinear,
)
from uoe_parallel.parallel.random import Stream, draw_from
from uoe_parallel.parallel.sharding import gather_full, load_full


@dataclass(frozen=True)
class DenseAttentionWeights:
    """Dense multi-head attention: rows of q, k, v and columns of `output` are in head order.

    A is num_heads x head width, C is num_kv_heads x head width.
    """

    q_AD: Tensor
    k_CD: Tensor
    v_CD: Tensor
    output_DA: Tensor
    q_bias_A: Tensor | None = None
    k_bias_C: Tensor | None = None
    v_bias_C: Tensor | None = None
    output_bias_D: Tensor | None = None


class SelectiveMultiHeadAttention(nn.Module):
    """Causal attention cut into one expert per key/value head, spread over the tensor group.

    Expert i projects and attends over its own selected tokens only, in sequence order, with
    rotary angles of their original positions (arXiv 2503.02495, section 3, made causal). Its
    slice of `qkv` holds the rows of its query heads, then its key, then its value head: the
    order of Megatron's own grouped-query layout.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        rope_base: float,
        bias: bool,
        backend: Backend,
        config: ModelParallelConfig,
        qkv_init: InitMethod,
        output_init: InitMethod,
        group: ProcessGroup,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        assert hidden_size % num_heads == 0 and num_heads % num_kv_heads == 0
        assert num_kv_heads % group.size() == 0
        self.num_experts = num_kv_heads
        self.queries_per_expert = num_heads // num_kv_heads
        self.head_width = hidden_size // num_heads
        self.rope_base = rope_base
        self.dropout = dropout
        self.backend = backend
        self.group = group
        self.qkv = SlicedColumnParallelLinear(
            hidden_size,
            (num_heads + 2 * num_kv_heads) * self.head_width,
            num_kv_heads,
            bias=bias,
            config=config,
            init_method=qkv_init,
            group=group,
        )
        self.output = SlicedRowParallelLinear(
            hidden_size,
            hidden_size,
            num_kv_heads,
            bias=bias,
            config=config,
            init_method=output_init,
            group=group,
        )

    @property
    def output_bias(self) -> Tensor | None:
        """The block's one bias [D], added once, outside routing."""
        return self.output.bias

    def forward(
        self,
        x: Tensor,
        gates_N: Tensor | None = None,
        assignment: Assignment | None = None,
        *,
        documents: Documents,
    ) -> Tensor:
        """Dense attention without its output bias, or the routed sum of this rank's experts.

        Dense: x [S or S/P, B, D] to the same shape. Routed: x [R, D] with fp32 `gates_N` to
        [R, D], each row the gated sum of its pairs' results.
        """
        if assignment is None or gates_N is None:
            return self._dense(x)
        counts_E = assignment.expert_counts_E
        qkv_N = self.qkv(assignment.gather(x), counts_E, self.backend)
        q_NHd, k_N1d, v_N1d = self._split(qkv_N)
        q_NHd = rotate(q_NHd, assignment.position_N, self.rope_base)
        k_N1d = rotate(k_N1d, assignment.position_N, self.rope_base)
        dropout = self.dropout if self.training else 0.0
        with draw_from(Stream.RANK, dropout):  # other heads on every rank
            attended_NHd = self.backend.causal_attention(
                q_NHd, k_N1d.squeeze(1), v_N1d.squeeze(1), assignment.run_lengths_G, dropout
            )
        gated = attended_NHd.flatten(1) * gates_N.to(x.dtype).unsqueeze(1)
        return assignment.sum_by_row(self.output(gated, counts_E, self.backend))

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., (H + 2) x d] of one expert to q [..., H, d], k and v [..., 1, d]."""
        heads = qkv.unflatten(-1, (self.queries_per_expert + 2, self.head_width))
        q, k, v = heads.split((self.queries_per_expert, 1, 1), dim=-2)
        return q, k, v

    def _dense(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)  # [S, B, E x (H + 2) x d]
        length, batch, _ = qkv.shape
        q, k, v = self._split(
            qkv.unflatten(-1, (-1, (self.queries_per_expert + 2) * self.head_width))
        )
        position = torch.arange(length, device=x.device).view(-1, 1, 1).expand(q.shape[:3])
        q = rotate(q, position, self.rope_base)
        k = rotate(k, position, self.rope_base)
        q, k, v = (t.flatten(2, 3).permute(1, 2, 0, 3) for t in (q, k, v))  # [B, heads, S, d]
        dropout = self.dropout if self.training else 0.0
        with draw_from(Stream.RANK, dropout):
            attended = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True
            )
        return self.output(attended.permute(2, 0, 1, 3).reshape(length, batch, -1))

    def load_dense(self, dense: DenseAttentionWeights) -> None:
        """Take this rank's heads of full dense weights."""
        load_full(self.qkv.weight, self._join(dense.q_AD, dense.k_CD, dense.v_CD), self.group)
        load_full(self.output.weight, dense.output_DA, self.group)
        if self.qkv.bias is not None:
            assert dense.q_bias_A is not None and dense.k_bias_C is not None
            assert dense.v_bias_C is not None and dense.output_bias_D is not None
            bias = self._join(dense.q_bias_A, dense.k_bias_C, dense.v_bias_C)
            load_full(self.qkv.bias, bias, self.group)
            load_full(self.output.bias, dense.output_bias_D, self.group)

    def to_dense(self) -> DenseAttentionWeights:
        """The full dense weights, on every rank. Collective over the tensor group."""
        q, k, v = self._part(gather_full(self.qkv.weight, self.group))
        output = gather_full(self.output.weight, self.group)
        if self.qkv.bias is None:
            return DenseAttentionWeights(q, k, v, output)
        q_bias, k_bias, v_bias = self._part(gather_full(self.qkv.bias, self.group))
        output_bias = gather_full(self.output.bias, self.group)
        return DenseAttentionWeights(q, k, v, output, q_bias, k_bias, v_bias, output_bias)

    def _join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows by kind, in head order, to rows by expert."""
        parts = [x.unflatten(0, (self.num_experts, -1)) for x in (q, k, v)]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _part(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of `_join`."""
        rows = qkv.unflatten(0, (self.num_experts, -1))
        queries, width = self.queries_per_expert * self.head_width, self.head_width
        q, k, v = rows.split((queries, width, width), dim=1)
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
