"""Attention within runs of rows by torch's fused kernels, which want runs of one length.

Shape suffixes: G runs, of one length class if padded; N rows of all runs, M keys of all runs; P
padded rows; H query heads that share keys and values, d their width; L places of a padded run, Q
those of queries, K those of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STRETCH = 256
"""Rows within which the CPU's kernel is left to mask later ones, see `_CausalAttention`."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Keys:
    """Runs of keys that are not the queries' own rows."""

    lengths_G: Tensor
    """Keys of each run, int64: at least one where the run has queries."""
    place_N: Tensor
    """Place of each query among the keys of its run, int64."""


class PaddedAttention:
    """Attention by torch's fused kernels, over runs padded at their ends.

    Runs whose lengths are within a factor of two share a call, so that one long document or one
    popular expert does not pad all the others.
    """

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
        """As `backends.Backend.attention`."""
        if keys is None:
            queries = key_rows = _Padding(run_lengths_G, run_lengths_G)
        else:
            size_G = torch.maximum(run_lengths_G, keys.lengths_G)
            queries, key_rows = _Padding(run_lengths_G, size_G), _Padding(keys.lengths_G, size_G)
        is_plain = causal and keys is None and dropout == 0
        if is_plain and q_NHd.device.type == "cpu" and len(q_NHd) > 0:
            return _CausalAttention.apply(q_NHd, k_Md, v_Md, queries)
        place_N = None if keys is None else keys.place_N
        return _by_class(
            q_NHd, k_Md, v_Md, queries, key_rows, causal=causal, place_N=place_N, dropout=dropout
        )

    def attention_to_kept(
        self, q_NHd: Tensor, k_NLd: Tensor, v_NLd: Tensor, lengths_N: Tensor
    ) -> Tensor:
        """As `backends.Backend.attention_to_kept`."""
        places_L = torch.arange(k_NLd.shape[1], device=k_NLd.device)
        kept_NL = places_L < lengths_N.unsqueeze(1)
        # To the kernel the heads, which share keys, are rows of one head.
        out_N1Hd = F.scaled_dot_product_attention(
            q_NHd.unsqueeze(1),
            k_NLd.unsqueeze(1),
            v_NLd.unsqueeze(1),
            attn_mask=kept_NL[:, None, None],
        )
        return out_N1Hd.squeeze(1)


def length_classes(lengths_G: Tensor, size_G: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The order of runs by their sizes, the largest first, and of each class of sizes within a
    factor of two of each other the `lengths_G` of its runs in that order, on the host."""
    size_G, order_G = size_G.sort(descending=True, stable=True)
    # The one copy to the host.
    host_G, size_G = torch.stack((lengths_G[order_G], size_G)).cpu()
    # Runs without a row count as of one, so that ranks without any take the same path. Classes
    # do not meet at powers of two, around which half of a sequence's tokens like to lie.
    class_G = (size_G.clamp(min=1).double().log2() + 0.5).ceil()
    _, runs_C = class_G.unique_consecutive(return_counts=True)
    return order_G, host_G.split(runs_C.tolist())


class _Padding:
    """Where the rows of runs lie when runs, the largest first, are padded to the longest of their
    length class, which is at least one.

    Classes are by `size_G`, so that two paddings of the same sizes have the same runs in each.
    """

    def __init__(self, lengths_G: Tensor, size_G: Tensor) -> None:
        order_G, self.lengths_C = length_classes(lengths_G, size_G)
        """Of the runs of each class, on the host."""
        self.shapes_C = [(len(n_G), max(1, int(n_G.max()))) for n_G in self.lengths_C]
        """Runs of each class and their padded length."""
        runs_C, longest_C = torch.tensor(self.shapes_C).unbind(1)
        padded_G = longest_C.repeat_interleave(runs_C).to(order_G.device)
        self.size = sum(runs * longest for runs, longest in self.shapes_C)
        self._order_G, self._start_G = order_G, lengths_G.cumsum(0) - lengths_G
        shift_G = torch.empty_like(order_G)
        shift_G[order_G] = padded_G.cumsum(0) - padded_G
        shift_N = torch.repeat_interleave(shift_G - self._start_G, lengths_G)
        self.place_N = shift_N + torch.arange(len(shift_N), device=shift_N.device)

    def pad(self, x_N: Tensor) -> Tensor:
        """[N, ...] to [P, ...], with zeros as padding."""
        padded = x_N.new_zeros(self.size, *x_N.shape[1:])
        return padded.index_copy(0, self.place_N, x_N)

    def repeat_last(self, *tensors: Tensor) -> list[Tensor]:
        """Each of [N, ...], N > 0, to [P, ...], with a run's last row as its padding."""
        starts_C = self._start_G[self._order_G].split([runs for runs, _ in self.shapes_C])
        rows = []
        for lengths_G, starts_G, (_, longest) in zip(
            self.lengths_C, starts_C, self.shapes_C, strict=True
        ):
            last_G1 = (lengths_G - 1).clamp(min=0).to(starts_G.device).unsqueeze(1)
            places_L = torch.arange(longest, device=starts_G.device)
            rows.append((starts_G.unsqueeze(1) + places_L.minimum(last_G1)).flatten())
        # Runs without a row may begin behind the last one.
        row_P = torch.cat(rows).clamp(max=len(tensors[0]) - 1)
        return [x.index_select(0, row_P) for x in tensors]

    def by_class(self, x_P: Tensor) -> list[Tensor]:
        """Views of [P, ...]: [G, L, ...] for each class."""
        parts = x_P.split([runs * longest for runs, longest in self.shapes_C])
        return [x.unflatten(0, shape) for x, shape in zip(parts, self.shapes_C, strict=True)]

    def unpad(self, x_P: Tensor) -> Tensor:
        """The inverse of `pad`, padding dropped."""
        return x_P.index_select(0, self.place_N)


def _by_class(
    q_NHd: Tensor,
    k_Md: Tensor,
    v_Md: Tensor,
    queries: _Padding,
    keys: _Padding,
    *,
    causal: bool,
    place_N: Tensor | None,
    dropout: float,
) -> Tensor:
    """One call of the kernel for each class; `place_N` as in `Keys`, None if the keys are the
    queries' rows."""
    results = []
    place_P = None if place_N is None else queries.pad(place_N)
    for number, (q_GQHd, k_GKd, v_GKd) in enumerate(
        zip(
            queries.by_class(queries.pad(q_NHd)),
            keys.by_class(keys.pad(k_Md)),
            keys.by_class(keys.pad(v_Md)),
            strict=True,
        )
    ):
        q_GHQd = q_GQHd.transpose(1, 2)
        # Keys and values are expanded, not copied, to the query heads that share them.
        shape = (*q_GHQd.shape[:2], *k_GKd.shape[1:])
        k_GHKd, v_GHKd = (x.unsqueeze(1).expand(shape) for x in (k_GKd, v_GKd))
        mask = None
        places_K = torch.arange(k_GKd.shape[1], device=q_NHd.device)
        if not causal:
            # Padding queries of an empty run see its first padding: no row may see nothing.
            lengths_G = keys.lengths_C[number].to(q_NHd.device).clamp(min=1)
            mask = places_K < lengths_G.view(-1, 1, 1, 1)
        elif place_P is not None:
            mask = places_K <= queries.by_class(place_P)[number][:, None, :, None]
        # Otherwise a causal mask hides a run's padding from its rows: none is materialised.
        out_GHQd = F.scaled_dot_product_attention(
            q_GHQd, k_GHKd, v_GHKd, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        results.append(out_GHQd.transpose(1, 2).flatten(0, 1))
    return queries.unpad(torch.cat(results))


class _CausalAttention(torch.autograd.Function):
    """Causal attention of runs by the CPU's fused kernel, in pieces.

    The kernel computes scores in blocks of up to 512 keys, also those that causality then hides:
    for a run of 512 rows twice as many as are seen, where dense attention over twice the length has
    one and a half times as many. Here a run is halved down to short stretches. Those are left to
    the kernel, and the later half of two sees the earlier one without a mask; what a row got from
    its stretch and from those before it is joined by their sums of exponentials (as in arXiv
    2205.14135). Runs that end before a stretch take no part in it.
    """

    @staticmethod
    def forward(ctx: Any, q_NHd: Tensor, k_Nd: Tensor, v_Nd: Tensor, padding: _Padding) -> Tensor:
        # Padding that repeats a row is computed for nothing, and nothing comes back from it.
        rows = padding.repeat_last(q_NHd, k_Nd.unsqueeze(1), v_Nd.unsqueeze(1))
        out_PHd = torch.empty_like(rows[0])
        precise = torch.promote_types(out_PHd.dtype, torch.float32)
        # Rows in a piece that lie beyond the stretch in which their run ends get no weights at all
        # in backward.
        lse_PH = out_PHd.new_full(out_PHd.shape[:2], torch.inf, dtype=precise)
        for lengths_G, q, k, v, *results in _classes(padding, *rows, out_PHd, lse_PH):
            for runs, later, seen, causal in causal_pieces(lengths_G):
                found = _flash(*_piece(q, k, v, runs, later, seen), 0.0, causal)
                out, lse = (x[runs, :, later] for x in results)
                if causal:
                    out.copy_(found[0])
                    lse.copy_(found[1])
                else:
                    out.lerp_(found[0], (found[1] - lse).sigmoid().unsqueeze(-1).to(out.dtype))
                    lse.copy_(torch.logaddexp(lse, found[1]))
        out_NHd = padding.unpad(out_PHd)
        ctx.save_for_backward(*rows, out_NHd, lse_PH)
        ctx.padding = padding
        return out_NHd

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *rows, out_NHd, lse_PH = ctx.saved_tensors
        padding: _Padding = ctx.padding
        d_out_PHd, out_PHd = padding.pad(grad_outputs[0]), padding.pad(out_NHd)
        d_rows = [torch.empty_like(x) for x in rows]
        views = _classes(padding, *rows, *d_rows, d_out_PHd, out_PHd, lse_PH)
        for lengths_G, q, k, v, d_q, d_k, d_v, *results in views:
            for runs, later, seen, causal in causal_pieces(lengths_G):
                d_out, out, lse = (x[runs, :, later] for x in results)
                piece = _piece(q, k, v, runs, later, seen)
                found = _flash_backward(d_out, *piece, out, lse, 0.0, causal)
                places = (d_q, later), (d_k, seen), (d_v, seen)
                for (d_x, rows_of), of_heads in zip(places, found, strict=True):
                    own = d_x[runs, :, rows_of]
                    if own.shape[1] != of_heads.shape[1]:
                        of_heads = of_heads.sum(1, keepdim=True)
                    own.copy_(of_heads) if causal else own.add_(of_heads)
        d_q_NHd, d_k_N1d, d_v_N1d = map(padding.unpad, d_rows)
        return d_q_NHd, d_k_N1d.squeeze(1), d_v_N1d.squeeze(1), None


def _classes(padding: _Padding, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each class, lengths of its runs and its views [G, heads, L, ...] of [P, heads, ...]."""
    views = ([x.transpose(1, 2) for x in padding.by_class(tensor)] for tensor in tensors)
    return zip(padding.lengths_C, *views, strict=True)


def _piece(
    q_GHLd: Tensor, k_G1Ld: Tensor, v_G1Ld: Tensor, runs: slice, later: slice, seen: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries at places `later`, and keys and values at `seen` for each head."""
    q, k, v = q_GHLd[runs, :, later], k_G1Ld[runs, :, seen], v_G1Ld[runs, :, seen]
    heads = (-1, q.shape[1], -1, -1)
    return q, k.expand(heads), v.expand(heads)


def causal_pieces(lengths_G: Tensor) -> Iterator[tuple[slice, slice, slice, bool]]:
    """What the kernel is called for, of runs in the order of their lengths, the longest first:
    runs, places of queries, places of keys, and whether a query sees no key after itself (the same
    places) or all of them. A query's own stretch comes first."""

    def halved(start: int, stop: int) -> Iterator[tuple[slice, slice, bool]]:
        stretches = -(-(stop - start) // _STRETCH)
        if stretches == 0:
            return
        if stretches == 1:
            yield slice(start, stop), slice(start, stop), True
            return
        middle = start + stretches // 2 * _STRETCH
        yield from halved(start, middle)
        yield from halved(middle, stop)
        yield slice(middle, stop), slice(start, middle), False

    for later, seen, causal in halved(0, int(lengths_G[0])):
        yield slice(int((lengths_G > later.start).sum())), later, seen, causal
