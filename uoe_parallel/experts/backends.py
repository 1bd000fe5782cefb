"""Arithmetic over sorted rows: products by slice and attention by run, behind one interface.

Every backend computes the same numbers up to rounding; a test holds those that run on a CPU against
each other.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from uoe_parallel.experts.padded import Keys, PaddedAttention


class Backend(Protocol):
    """What experts need from a device."""

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        """Each block of rows times its expert's slice: [N, M].

        counts_E: int64, rows of each expert in the order of `x_NK`, with sum N.
        """
        ...

    def all_products(self, x_NK: Tensor, w_EKM: Tensor) -> Tensor:
        """All rows times every slice: [E, N, M]."""
        ...

    def attention(
        self,
        q_NHd: Tensor,
        k_Md: Tensor,
        v_Md: Tensor,
        run_lengths_G: Tensor,
        *,
        causal: bool,
        keys: Keys | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Attention within each run of rows: [N, H, d].

        Every row is a query with a key and value, which its H heads share, unless there are `keys`
        of another number M. If causal, a query sees the keys up to its own place, otherwise all of
        its run. run_lengths_G: int64 queries of each run, with sum N. dropout: the share of
        probabilities to zero, drawn from the default generator.
        """
        ...

    def attention_to_kept(
        self, q_NHd: Tensor, k_NLd: Tensor, v_NLd: Tensor, lengths_N: Tensor
    ) -> Tensor:
        """Of each query to the first `lengths_N` (int64, not 0) of its own L keys: [N, H, d]."""
        ...


class LoopBackend(PaddedAttention):
    """One product per slice: any dtype and any width."""

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        blocks = x_NK.split(counts_E.tolist())
        return torch.cat([x @ w for x, w in zip(blocks, w_EKM, strict=True)])

    def all_products(self, x_NK: Tensor, w_EKM: Tensor) -> Tensor:
        # Not by one broadcast product, whose gradient of x would be made for each slice at once.
        return torch.stack([x_NK @ w for w in w_EKM])


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

    def attention(
        self,
        q_NHd: Tensor,
        k_Md: Tensor,
        v_Md: Tensor,
        run_lengths_G: Tensor,
        *,
        causal: bool,
        keys: Keys | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        # The variable-length kernel has no dropout, and no mask for queries with gaps between them.
        if dropout > 0 or (causal and keys is not None):
            return super().attention(
                q_NHd, k_Md, v_Md, run_lengths_G, causal=causal, keys=keys, dropout=dropout
            )
        from torch.nn.attention.varlen import varlen_attn

        key_lengths_G = run_lengths_G if keys is None else keys.lengths_G
        starts, key_starts = (
            F.pad(lengths_G.cumsum(0), (1, 0)).to(torch.int32)
            for lengths_G in (run_lengths_G, key_lengths_G)
        )
        out = varlen_attn(
            q_NHd,
            k_Md.unsqueeze(1),
            v_Md.unsqueeze(1),
            starts,
            key_starts,
            int(run_lengths_G.max()),
            int(key_lengths_G.max()),
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=True,
        )
        assert isinstance(out, Tensor)
        return out


class ReferenceBackend:
    """Every row on its own, in products whose shapes depend on nothing but what the row sees.

    A matrix product's rounding depends on its number of rows; here no bit of a row's result can
    depend on another sequence or document, nor in causal attention on a later row, without dropout.
    For tests: slow, plain, exact.
    """

    # All begin with a block of no rows that hangs on every input: a rank without a row must
    # still meet the others in the exchanges of the backward pass.

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        expert_N = torch.repeat_interleave(counts_E).tolist()
        rows = [x_NK[i : i + 1] @ w_EKM[e] for i, e in enumerate(expert_N)]
        return torch.cat([x_NK[:0] @ w_EKM.sum(0), *rows])

    def all_products(self, x_NK: Tensor, w_EKM: Tensor) -> Tensor:
        rows = [x_NK[i : i + 1] @ w_EKM for i in range(len(x_NK))]
        return torch.cat([x_NK[:0] @ w_EKM, *rows], dim=1)

    def attention(
        self,
        q_NHd: Tensor,
        k_Md: Tensor,
        v_Md: Tensor,
        run_lengths_G: Tensor,
        *,
        causal: bool,
        keys: Keys | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        key_lengths = (run_lengths_G if keys is None else keys.lengths_G).tolist()
        rows = [q_NHd[:0] * (k_Md[:0] + v_Md[:0]).sum(0)]
        row = first = 0
        for length, num_keys in zip(run_lengths_G.tolist(), key_lengths, strict=True):
            for place in range(length):
                if keys is not None:
                    place = int(keys.place_N[row])
                seen = slice(first, first + (place + 1 if causal else num_keys))
                rows.append(_attend_row(q_NHd[row], k_Md[seen], v_Md[seen], dropout))
                row += 1
            first += num_keys
        return torch.cat(rows)

    def attention_to_kept(
        self, q_NHd: Tensor, k_NLd: Tensor, v_NLd: Tensor, lengths_N: Tensor
    ) -> Tensor:
        rows = [
            _attend_row(q_NHd[i], k_NLd[i, :length], v_NLd[i, :length], 0.0)
            for i, length in enumerate(lengths_N.tolist())
        ]
        return torch.cat([q_NHd[:0], *rows])


def _attend_row(q_Hd: Tensor, k_Kd: Tensor, v_Kd: Tensor, dropout: float) -> Tensor:
    """Of one row to all keys: [1, H, d]."""
    scores_HK = torch.stack([(k_Kd * q_d).sum(-1) for q_d in q_Hd])
    weights_HK = F.dropout((scores_HK * q_Hd.shape[-1] ** -0.5).softmax(-1), dropout)
    return (weights_HK.unsqueeze(-1) * v_Kd).sum(1).unsqueeze(0)


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The best backend for what the model computes in."""
    if device.type == "cuda":
        # There the grouped product and flash attention are made for half precision.
        return FlashBackend() if dtype is torch.bfloat16 else LoopBackend()
    return LoopBackend() if dtype is torch.float64 else GroupedBackend()
