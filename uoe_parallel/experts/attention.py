"""SMHA: multi-head attention whose experts are the key/value heads with their query heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from uoe_parallel.experts.assignment import Assignment
from uoe_parallel.experts.backends import Backend, Keys
from uoe_parallel.experts.cache import KeyValueCache
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.rotary import rotate
from uoe_parallel.experts.slices import (
    InitMethod,
    SlicedColumnParallelLinear,
    SlicedRowParallelLinear,
)
from uoe_parallel.parallel.random import Stream, draw_from, recompute
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
    """Attention cut into one expert per key/value head, spread over the tensor group.

    With `keys_and_values` "selected", expert i projects and attends over its own selected tokens
    only, in sequence order, with rotary angles of their original positions (arXiv 2503.02495,
    section 3, here causal or bidirectional). With "all", only queries are selected, and every head
    has the keys and values of all tokens. A token attends within its document, which it takes the
    position from; padding attends to nothing, and nothing to it. Without a `rope_base` positions
    are the hidden states' own matter, and no angle is turned by them.

    Expert i's slice of `qkv` holds the rows of its query heads, then its key, then its value head:
    the order of Megatron's own grouped-query layout.

    With `recompute`, the dense block keeps nothing between its linears but their ends.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        rope_base: float | None,
        causal: bool,
        keys_and_values: Literal["selected", "all"],
        bias: bool,
        backend: Backend,
        config: ModelParallelConfig,
        qkv_init: InitMethod,
        output_init: InitMethod,
        group: ProcessGroup,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        assert hidden_size % num_heads == 0 and num_heads % num_kv_heads == 0
        assert num_kv_heads % group.size() == 0
        self.num_experts = num_kv_heads
        self.queries_per_expert = num_heads // num_kv_heads
        self.head_width = hidden_size // num_heads
        self.rope_base = rope_base
        self.causal = causal
        self.needs_all_rows = keys_and_values == "all"
        self.dropout = dropout
        self.recompute = recompute
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
        if rope_base is None and self.qkv.bias is not None:
            self.qkv.bias.register_hook(self._without_keys)
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
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Dense attention without its output bias, or the routed sum of this rank's experts.

        Dense: x [S or S/P, B, D] to the same shape, `documents` of its sequences. Routed: x [R, D]
        with fp32 `gates_N` to [R, D], each row the gated sum of its pairs' results; if it
        `needs_all_rows`, R = S x B rows of all tokens of `documents`, by position.

        With a cache, for tokens on every rank (R = S x B) and without gradients: an empty one is
        filled; to another one, S = 1 token is added for each sequence, which sees what it holds.
        """
        if assignment is None or gates_N is None:
            return self._dense(x, documents, cache)
        attended_NHd = self._attend_selected(x, assignment, documents, cache)
        gated_NA = attended_NHd.flatten(1) * gates_N.to(x.dtype).unsqueeze(1)
        return self.output(gated_NA, assignment, self.backend)

    def _attend_selected(
        self,
        x_RD: Tensor,
        assignment: Assignment,
        documents: Documents,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Of each pair: [N, H, d]."""
        position_N, lengths_G = assignment.position_N, assignment.run_lengths_G
        columns = slice(self.queries_per_expert * self.head_width if self.needs_all_rows else None)
        with _gathered(x_RD, assignment) as rows_ND:
            projected = self.qkv(rows_ND, assignment.expert_counts_E, self.backend, columns)
        del rows_ND
        if not self.needs_all_rows:
            q_NHd, k_N1d, v_N1d = self._split(projected, position_N)
            k_Nd, v_Nd = k_N1d.squeeze(1), v_N1d.squeeze(1)
            return self._attend(q_NHd, k_Nd, v_Nd, lengths_G, None, documents, cache)
        q_NHd = self._turn(projected.unflatten(-1, (-1, self.head_width)), position_N)
        k_Md, v_Md, key_lengths_G = self._all_keys_and_values(x_RD, documents)
        # All tokens of a document are keys, so a query's place among them is its position.
        keys = Keys(key_lengths_G, position_N)
        return self._attend(q_NHd, k_Md, v_Md, lengths_G, keys, documents, cache)

    def _all_keys_and_values(
        self, x_TD: Tensor, documents: Documents
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of all tokens but padding for each expert: [M, d], sorted as an assignment's pairs, and
        how many lie in each (expert, document)."""
        row_M, lengths_C = documents.real_tokens
        keys_and_values = slice(self.queries_per_expert * self.head_width, None)
        kv_EM = self.qkv(x_TD.index_select(0, row_M), None, self.backend, keys_and_values)
        position_M = documents.position_SB.flatten()[row_M]
        kv_EM2d = self._turn(kv_EM.unflatten(-1, (2, -1)), position_M, kept=1)
        k_Md, v_Md = kv_EM2d.flatten(0, 1).unbind(1)
        return k_Md, v_Md, lengths_C.repeat(len(kv_EM))

    def _attend(
        self,
        q_NHd: Tensor,
        k_Md: Tensor,
        v_Md: Tensor,
        lengths_G: Tensor,
        keys: Keys | None,
        documents: Documents,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Attention within (expert, document): [N, H, d]. lengths_G: queries of each, int64."""
        if cache is not None:
            adds_step = not cache.is_empty
            key_lengths_G = lengths_G if keys is None else keys.lengths_G
            cache.append(k_Md, v_Md, self._by_sequence(key_lengths_G, documents))
            if adds_step:
                assert len(documents.number_SB) == 1
                run_N = torch.repeat_interleave(self._by_sequence(lengths_G, documents))
                return self.backend.attention_to_kept(q_NHd, *cache.read(run_N))
        dropout = self.dropout if self.training else 0.0
        with draw_from(Stream.RANK, dropout):  # other heads on every rank
            return self.backend.attention(
                q_NHd, k_Md, v_Md, lengths_G, causal=self.causal, keys=keys, dropout=dropout
            )

    def _by_sequence(self, lengths_G: Tensor, documents: Documents) -> Tensor:
        """Lengths by (expert, document) to lengths by (expert, sequence)."""
        return documents.sum_by_sequence(lengths_G.view(-1, documents.count)).flatten()

    def _turn(self, heads: Tensor, position: Tensor, *, kept: int = 0) -> Tensor:
        """As `rotate`, where positions are rotary."""
        if self.rope_base is None:
            return heads
        return rotate(heads, position, self.rope_base, kept=kept)

    def _without_keys(self, bias_gradient: Tensor) -> Tensor:
        """The gradient of the projections' biases with zeros for those of keys.

        Without rotary positions such a bias shifts all scores of a query alike, which softmax does
        not see. What is left of its gradient is rounding, and AdamW would make whole steps of it.
        """
        by_expert = bias_gradient.clone().view(-1, self.queries_per_expert + 2, self.head_width)
        by_expert[:, self.queries_per_expert] = 0
        return by_expert.view_as(bias_gradient)

    def _split(self, qkv: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., (H + 2) x d] of one expert to q [..., H, d], k and v [..., 1, d], q and k turned
        by positions that broadcast to [...]."""
        heads = qkv.unflatten(-1, (self.queries_per_expert + 2, self.head_width))
        heads = self._turn(heads, position, kept=1)
        q, k, v = heads.split((self.queries_per_expert, 1, 1), dim=-2)
        return q, k, v

    def _dense(self, x: Tensor, documents: Documents, cache: KeyValueCache | None) -> Tensor:
        qkv = self.qkv(x)  # [S, B, E x (H + 2) x d]
        qkv_SBE = qkv.unflatten(-1, (-1, (self.queries_per_expert + 2) * self.head_width))
        attend = self._attend_sequences
        if cache is not None or not documents.one_each:
            attend = partial(self._attend_documents, documents=documents, cache=cache)
        attended = recompute(attend, qkv_SBE) if self.recompute else attend(qkv_SBE)
        return self.output(attended)

    def _attend_sequences(self, qkv_SBE: Tensor) -> Tensor:
        """Dense attention where each sequence is one document: [S, B, E x H x d]."""
        length, batch = qkv_SBE.shape[:2]
        position = torch.arange(length, device=qkv_SBE.device).view(-1, 1, 1)
        q, k, v = self._split(qkv_SBE, position)
        q, k, v = (t.flatten(2, 3).permute(1, 2, 0, 3) for t in (q, k, v))  # [B, heads, S, d]
        dropout = self.dropout if self.training else 0.0
        with draw_from(Stream.RANK, dropout):
            attended = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=self.causal, enable_gqa=True
            )
        return attended.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _attend_documents(
        self, qkv_SBE: Tensor, documents: Documents, cache: KeyValueCache | None
    ) -> Tensor:
        """The same by runs of documents' tokens, as in routed attention with all of them selected;
        zero for padding."""
        length, batch, num_experts, _ = qkv_SBE.shape
        row_M, lengths_C = documents.real_tokens
        qkv_EM = qkv_SBE.flatten(0, 1).index_select(0, row_M).transpose(0, 1)
        q, k, v = self._split(qkv_EM, documents.position_SB.flatten()[row_M])
        lengths_G = lengths_C.repeat(num_experts)
        q_NHd, k_Nd, v_Nd = q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2)
        attended_NHd = self._attend(q_NHd, k_Nd, v_Nd, lengths_G, None, documents, cache)
        attended_MA = attended_NHd.unflatten(0, (num_experts, -1)).transpose(0, 1).flatten(1)
        rows_TA = attended_MA.new_zeros(length * batch, attended_MA.shape[1])
        return rows_TA.index_copy(0, row_M, attended_MA).view(length, batch, -1)

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


@contextmanager
def _gathered(x_RD: Tensor, assignment: Assignment) -> Iterator[Tensor]:
    """Each pair's row, [N, D], for products that autograd then does not keep it for: it is gathered
    again in backward.

    A head is narrow and a row is wide, so that the rows of all heads would be most of what is kept.
    """
    rows_ND = assignment.gather(x_RD)
    # All tensors without an element have the same address, 0.
    kept_RD, address = x_RD.detach(), rows_ND.untyped_storage().data_ptr() or None

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if saved.untyped_storage().data_ptr() != address:
            return saved
        return saved.shape, saved.stride(), int(saved.storage_offset())

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return assignment.gather(kept_RD).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield rows_ND
