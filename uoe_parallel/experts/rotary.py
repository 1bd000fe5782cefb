"""Rotary positions (Su et al., arXiv 2104.09864), by original index."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotate feature pairs (i, i + d/2) of `x` by angle position * base^(-2i/d).

    x: [..., h, d]; position: int64 of x's leading shape [...]. Angles are taken in fp32 (fp64 for
    fp64 input) whatever the dtype of x: bf16 could not tell far positions apart.
    """
    half = x.shape[-1] // 2
    precise = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(half, device=x.device, dtype=precise) / half
    angle = (position.to(precise).unsqueeze(-1) * base**-exponent).unsqueeze(-2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(precise).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
