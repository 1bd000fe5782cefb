"""Arithmetic over sorted rows: products by slice and attention by run, behind one interface.

Every backend computes the same numbers up to rounding; a test holds those that run on a CPU against
each other.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Backend(Protocol):
    """What experts need from a device."""

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        """Each block of rows times its expert's slice: [N, M].

        counts_E: int64, rows of each expert in the order of `x_NK`, with sum N.
        """
        ...

    def causal_attention(
        self,
        q_NHd: Tensor,
        k_Nd: Tensor,
        v_Nd: Tensor,
        run_lengths_G: Tensor,
        dropout: float = 0.0,
    ) -> Tensor:
        """Attention within each run of rows, each row seeing itself and those before: [N, H, d].

        The H query heads of a row share its key and value. run_lengths_G: int64 with sum N.
        dropout: the share of probabilities to zero, drawn from the default generator.
        """
        ...


class PaddedAttention:
    """Attention by one call of torch's fused kernel over runs padded at their ends.

    A causal mask already hides a run's padding from its rows, so no mask is materialised and the
    padding's own results are dropped.
    """

    def causal_attention(
        self,
        q_NHd: Tensor,
        k_Nd: Tensor,
        v_Nd: Tensor,
        run_lengths_G: Tensor,
        dropout: float = 0.0,
    ) -> Tensor:
        num_runs, (_, num_heads, width) = run_lengths_G.shape[0], q_NHd.shape
        # At least one (padding) position, so that ranks without a row take the same path.
        longest = max(1, int(run_lengths_G.max()))
        run_N = torch.repeat_interleave(run_lengths_G)
        start_G = run_lengths_G.cumsum(0) - run_lengths_G
        within_N = torch.arange(run_N.shape[0], device=run_N.device) - start_G[run_N]
        place_N = run_N * longest + within_N

        def pad(x: Tensor) -> Tensor:  # [N, h, d] -> [G, h, longest, d]
            padded = x.new_zeros(num_runs * longest, *x.shape[1:]).index_copy(0, place_N, x)
            return padded.view(num_runs, longest, *x.shape[1:]).transpose(1, 2)

        # Keys and values are expanded, not copied, to the query heads that share them.
        shape = (num_runs, num_heads, longest, width)
        k_GHSd = pad(k_Nd.unsqueeze(1)).expand(shape)
        v_GHSd = pad(v_Nd.unsqueeze(1)).expand(shape)
        out_GHSd = F.scaled_dot_product_attention(
            pad(q_NHd), k_GHSd, v_GHSd, dropout_p=dropout, is_causal=True
        )
        out = out_GHSd.transpose(1, 2).reshape(num_runs * longest, num_heads, width)
        return out.index_select(0, place_N)


class LoopBackend(PaddedAttention):
    """One product per slice: any dtype and any width."""

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        blocks = x_NK.split(counts_E.tolist())
        return torch.cat([x @ w for x, w in zip(blocks, w_EKM, strict=True)])


class GroupedBackend(LoopBackend):
    """torch's grouped product: one call for all slices (fp32, bf16).

    It wants rows that begin at multiples of 16 bytes; slices of odd widths are multiplied one by
    one.
    """

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        if any(width * x_NK.element_size() % 16 for width in w_EKM.shape[1:]):
            return super().products(x_NK, w_EKM, counts_E)
        return F.grouped_mm(x_NK, w_EKM, offs=counts_E.cumsum(0).to(torch.int32))


class FlashBackend(GroupedBackend):
    """Grouped products and variable-length flash attention: half precision on CUDA."""

    def causal_attention(
        self,
        q_NHd: Tensor,
        k_Nd: Tensor,
        v_Nd: Tensor,
        run_lengths_G: Tensor,
        dropout: float = 0.0,
    ) -> Tensor:
        if dropout > 0:  # the variable-length kernel has none
            return super().causal_attention(q_NHd, k_Nd, v_Nd, run_lengths_G, dropout)
        from torch.nn.attention.varlen import varlen_attn

        starts = F.pad(run_lengths_G.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(run_lengths_G.max())
        out = varlen_attn(
            q_NHd,
            k_Nd.unsqueeze(1),
            v_Nd.unsqueeze(1),
            starts,
            starts,
            longest,
            longest,
            window_size=(-1, 0),
            enable_gqa=True,
        )
        assert isinstance(out, Tensor)
        return out


class ReferenceBackend:
    """Every row on its own, in products whose shapes depend on nothing but the rows before it.

    A matrix product's rounding depends on its number of rows; here no bit of a row's result can
    depend on a later row or on another sequence, without dropout. For tests: slow, plain, exact.
    """

    # Both begin with a block of no rows that hangs on every input: a rank without a row must
    # still meet the others in the exchanges of the backward pass.

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        expert_N = torch.repeat_interleave(counts_E).tolist()
        rows = [x_NK[i : i + 1] @ w_EKM[e] for i, e in enumerate(expert_N)]
        return torch.cat([x_NK[:0] @ w_EKM.sum(0), *rows])

    def causal_attention(
        self,
        q_NHd: Tensor,
        k_Nd: Tensor,
        v_Nd: Tensor,
        run_lengths_G: Tensor,
        dropout: float = 0.0,
    ) -> Tensor:
        rows = [q_NHd[:0] * (k_Nd[:0] + v_Nd[:0]).unsqueeze(1)]
        start = 0
        for length in run_lengths_G.tolist():
            for i in range(start, start + length):
                k_Kd, v_Kd = k_Nd[start : i + 1], v_Nd[start : i + 1]
                scores_HK = torch.stack([(k_Kd * q_d).sum(-1) for q_d in q_NHd[i]])
                weights_HK = (scores_HK * q_NHd.shape[-1] ** -0.5).softmax(-1)
                weights_HK = F.dropout(weights_HK, dropout)
                rows.append((weights_HK.unsqueeze(-1) * v_Kd).sum(1, keepdim=True).transpose(0, 1))
            start += length
        return torch.cat(rows)


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The best backend for what the model computes in."""
    if device.type == "cuda":
        # There the grouped product and flash attention are made for half precision.
        return FlashBackend() if dtype is torch.bfloat16 else LoopBackend()
    return LoopBackend() if dtype is torch.float64 else GroupedBackend()
