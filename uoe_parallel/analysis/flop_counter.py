"""torch's flop counter, with formulas for what it takes for nothing on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """A context in which the floating-point operations of all matrix products of this thread are
    counted, two for a multiply-add; `get_total_flops` and `get_flop_counts` tell them.

    Beside what torch knows it sees its grouped product, and attention by the CPU's fused kernel.
    That is counted as torch counts CUDA's kernels: the whole rectangle of queries and keys that a
    call is given, causal or not, masked or not, and in backward the scores once more.
    """
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def _grouped_mm(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Of torch's grouped product, by the shapes of its factors: groups lie along a dimension of one
    factor or are a dimension of both."""
    rows = a[1:] if (len(a), len(b)) == (3, 2) else a
    return 2 * math.prod(rows) * b[-1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Of [B, heads, places, d], where keys and values may have fewer heads, which share them."""
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    d_out: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(d_out, query, key, value)


_FORMULAS = {
    torch.ops.aten._grouped_mm: _grouped_mm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
