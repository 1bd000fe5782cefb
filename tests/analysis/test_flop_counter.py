"""Formulas of the flop counter against hand counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uoe_parallel.analysis.flop_counter import flop_counter

G, N, K, M = 3, 12, 8, 16
"""Groups, rows of all of them, and widths: multiples of 16 bytes, as the kernel wants."""
OFFSETS = torch.tensor([5, 5, 12], dtype=torch.int32)
B, H, S, L, D = 2, 4, 5, 7, 8
"""Sequences, query heads, queries, keys, and their width."""


def _count(function: Callable[[], object]) -> int:
    with flop_counter() as counter:
        function()
    return counter.get_total_flops()


def test_grouped_products() -> None:
    rows, weights = torch.randn(N, K), torch.randn(G, K, M)
    assert _count(lambda: F.grouped_mm(rows, weights, offs=OFFSETS)) == 2 * N * K * M
    left, right = torch.randn(N, K), torch.randn(N, M)
    outer = _count(lambda: F.grouped_mm(left.t(), right, offs=OFFSETS))
    assert outer == 2 * N * K * M
    matrices = torch.randn(G, K, M)
    columns = torch.randn(M, N)
    assert _count(lambda: F.grouped_mm(matrices, columns, offs=OFFSETS)) == 2 * N * K * M
    assert _count(lambda: F.grouped_mm(weights, weights.mT)) == 2 * G * K * M * K


def test_gradients_of_grouped_products() -> None:
    rows = torch.randn(N, K, requires_grad=True)
    weights = torch.randn(G, K, M, requires_grad=True)
    y = F.grouped_mm(rows, weights, offs=OFFSETS)
    assert _count(lambda: y.backward(torch.ones_like(y))) == 2 * 2 * N * K * M


def _attention(kv_heads: int, *, causal: bool, masked: bool) -> tuple[int, int]:
    """Forward and backward."""
    q = torch.randn(B, H, S, D, requires_grad=True)
    k, v = (torch.randn(B, kv_heads, L, D, requires_grad=True) for _ in range(2))
    mask = torch.arange(L).expand(S, L) < 3 if masked else None
    found: list[Tensor] = []

    def attend() -> None:
        found.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=kv_heads != H
            )
        )

    forward = _count(attend)
    return forward, _count(lambda: found[0].sum().backward())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_fused_attention_counts_whole_rectangles(kv_heads: int, causal: bool) -> None:
    product = 2 * B * H * S * L * D
    assert _attention(kv_heads, causal=causal, masked=False) == (2 * product, 5 * product)


def test_what_a_mask_hides_is_counted() -> None:
    product = 2 * B * H * S * L * D
    assert _attention(H, causal=False, masked=True) == (2 * product, 5 * product)


def test_products_into_given_memory() -> None:
    a, b, out = torch.randn(N, K), torch.randn(K, M), torch.empty(N, M)
    assert _count(lambda: torch.mm(a, b, out=out)) == 2 * N * K * M
    assert _count(lambda: torch.addmm(out, a, b, out=out)) == 2 * N * K * M
