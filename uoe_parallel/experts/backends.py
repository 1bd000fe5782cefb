"""Arithmetic over sorted rows: products by slice and attention by run, behind one interface.

Every backend computes the same numbers up to rounding; a test holds those that run on a CPU against
each other.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.config.schema import ExpertProducts
from uoe_parallel.errors import UserError
from uoe_parallel.experts.padded import Keys, PaddedAttention
from uoe_parallel.experts.timing import time_products

CHUNK_BYTES = 2**22
"""On a CPU, where small products cost nothing more. A GPU's are better large, and it adds up in a
fixed order only what is summed at once."""


class Backend(Protocol):
    """What experts need from a device."""

    chunk_bytes: int | None
    """About how many bytes of pairs' results may wait to be summed; None for all there are."""

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        """Each block of rows times its expert's slice: [N, M].

        counts_E: int64, rows of each expert in the order of `x_NK`, with sum N. Not differentiated.
        """
        ...

    def outer_products(self, out_EMK: Tensor, y_NM: Tensor, x_NK: Tensor, counts_E: Tensor) -> None:
        """Put the sum over each expert's rows of y x^T into `out_EMK`, of any strides.
        Not differentiated."""
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

    def __init__(self, chunk_bytes: int | None = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        y_NM = x_NK.new_empty(len(x_NK), w_EKM.shape[2])
        counts = counts_E.tolist()
        for x, w, y in zip(x_NK.split(counts), w_EKM, y_NM.split(counts), strict=True):
            torch.mm(x, w, out=y)
        return y_NM

    def outer_products(self, out_EMK: Tensor, y_NM: Tensor, x_NK: Tensor, counts_E: Tensor) -> None:
        counts = counts_E.tolist()
        for y, x, out in zip(y_NM.split(counts), x_NK.split(counts), out_EMK, strict=True):
            torch.mm(y.t(), x, out=out)

    def all_products(self, x_NK: Tensor, w_EKM: Tensor) -> Tensor:
        # Not by one broadcast product, whose gradient of x would be made for each slice at once.
        return torch.stack([x_NK @ w for w in w_EKM])


class GroupedBackend(LoopBackend):
    """torch's grouped product: one call for all slices (fp32, bf16).

    It wants rows that begin at multiples of 16 bytes; slices of odd widths are multiplied one by
    one.
    """

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        if _is_unaligned(x_NK, w_EKM[0]):
            return super().products(x_NK, w_EKM, counts_E)
        return F.grouped_mm(x_NK, w_EKM, offs=counts_E.cumsum(0).to(torch.int32))

    def outer_products(self, out_EMK: Tensor, y_NM: Tensor, x_NK: Tensor, counts_E: Tensor) -> None:
        if _is_unaligned(x_NK, y_NM):
            super().outer_products(out_EMK, y_NM, x_NK, counts_E)
            return
        out_EMK.copy_(F.grouped_mm(y_NM.t(), x_NK, offs=counts_E.cumsum(0).to(torch.int32)))


def _is_unaligned(*matrices: Tensor) -> bool:
    return any(x.shape[-1] * x.element_size() % 16 for x in matrices)


class FlashAttention(PaddedAttention):
    """Variable-length flash attention: half precision on CUDA."""

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


class FlashBackend(FlashAttention, GroupedBackend):
    """Flash attention with grouped products."""


class FlashLoopBackend(FlashAttention, LoopBackend):
    """Flash attention with one product per slice."""


class ReferenceBackend:
    """Every row on its own, in products whose shapes depend on nothing but what the row sees.

    A matrix product's rounding depends on its number of rows; here no bit of a row's result can
    depend on another sequence or document, nor in causal attention on a later row, without dropout.
    For tests: slow, plain, exact.
    """

    chunk_bytes: int | None = None

    def products(self, x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
        expert_N = torch.repeat_interleave(counts_E).tolist()
        rows = [x_NK[i : i + 1] @ w_EKM[e] for i, e in enumerate(expert_N)]
        return torch.cat([x_NK.new_empty(0, w_EKM.shape[2]), *rows])

    def outer_products(self, out_EMK: Tensor, y_NM: Tensor, x_NK: Tensor, counts_E: Tensor) -> None:
        blocks = zip(y_NM.split(counts_E.tolist()), x_NK.split(counts_E.tolist()), strict=True)
        out_EMK.copy_(torch.stack([y.t() @ x for y, x in blocks]))

    # What is differentiated begins with a block of no rows that hangs on every input: a rank
    # without a row must still meet the others in the exchanges of the backward pass.

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


def choose_backend(
    device: torch.device, dtype: torch.dtype, group: ProcessGroup | None = None
) -> Backend:
    """The fastest backend for what the model computes in; see `pick_backend`."""
    return pick_backend(device, dtype, "auto", group)[0]


def pick_backend(
    device: torch.device,
    dtype: torch.dtype,
    products: ExpertProducts,
    group: ProcessGroup | None,
) -> tuple[Backend, str]:
    """The backend with the products asked for, or with the fastest, and its name for the log.

    The same on all ranks of `group`, over which it is collective. Raises UserError for products
    that `dtype` does not have on `device`.
    """
    found = available_backends(device, dtype)
    if products in found:
        return found[products], products
    if products != "auto":
        raise UserError(
            f"training.expert_products={products} is not for {dtype} on {device.type}; use auto or "
            + " or ".join(found)
        )
    if len(found) == 1:
        [(name, backend)] = found.items()
        return backend, name
    seconds = time_products(found, device, dtype, group)
    name, other, *_ = sorted(seconds, key=seconds.__getitem__)
    return found[name], f"{name} ({seconds[name] / seconds[other]:.2f} x {other})"


def available_backends(device: torch.device, dtype: torch.dtype) -> dict[str, Backend]:
    """By the name of their products, those that `dtype` has on `device`."""
    if device.type == "cuda":
        # There the grouped product and flash attention are made for half precision.
        half: dict[str, Backend] = {"grouped": FlashBackend(None), "loop": FlashLoopBackend(None)}
        return half if dtype is torch.bfloat16 else {"loop": LoopBackend(None)}
    if dtype is torch.float64:
        return {"loop": LoopBackend()}
    return {"grouped": GroupedBackend(), "loop": LoopBackend()}
