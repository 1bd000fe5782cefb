"""Rotary positions (Su et al., arXiv 2104.09864), by original index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float, *, kept: int = 0) -> Tensor:
    """Rotate feature pairs (i, i + d/2) of `x` by angle position * base^(-2i/d).

    x: [..., h, d], of which the last `kept` of h are returned as they are; position: int64 that
    broadcasts to x's leading shape [...]. Angles are taken in fp32 (fp64 for fp64 input) whatever
    the dtype of x: bf16 could not tell far positions apart. For backward positions alone are kept.
    """
    return _Rotation.apply(x, position, base, kept)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor, base: float, kept: int) -> Tensor:
        ctx.save_for_backward(position)
        ctx.base, ctx.kept = base, kept
        return _rotated(x, position, base, kept)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        # The gradient of a rotation is the rotation back.
        (position,) = ctx.saved_tensors
        return _rotated(grad_outputs[0], -position, ctx.base, ctx.kept), None, None, None


def _rotated(x: Tensor, position: Tensor, base: float, kept: int) -> Tensor:
    half, turned = x.shape[-1] // 2, x.shape[-2] - kept
    precise = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(half, device=x.device, dtype=precise) / half
    angle = position.to(precise).unsqueeze(-1) * base**-exponent
    cos, sin = angle.cos(), angle.sin()
    y = torch.empty(x.shape, dtype=precise, device=x.device)
    y[..., turned:, :] = x[..., turned:, :]
    # Head by head: over a few heads that share angles torch's loops are four times as slow.
    for head in range(turned):
        a, b = x[..., head, :].to(precise).chunk(2, dim=-1)
        out_a, out_b = y[..., head, :].chunk(2, dim=-1)
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return y.to(x.dtype)
