"""The activation between an expert's two products, and the gate on what comes of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, gated: bool) -> Tensor:
    """gelu(x); if `gated`, silu(gate) * up of x = [gate | up] along the last dimension, which then
    is half as wide (SwiGLU, arXiv 2002.05202)."""
    if not gated:
        return F.gelu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class GatedActivation(torch.autograd.Function):
    """activate(x_NF, gated) * gates_N: of what its gradient needs only `x_NF` is kept, and the
    activation is computed again. gates_N: fp32 or fp64, and not rounded to the dtype of x_NF."""

    @staticmethod
    def forward(ctx: Any, x_NF: Tensor, gates_N: Tensor, gated: bool) -> Tensor:
        ctx.save_for_backward(x_NF, gates_N)
        ctx.gated = gated
        return activate(x_NF, gated).mul_(gates_N.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NF, gates_N = ctx.saved_tensors
        (dy_NF,) = grad_outputs
        d_gates_N = (dy_NF * activate(x_NF, ctx.gated)).sum(1, dtype=gates_N.dtype)
        d_active_NF = (dy_NF * gates_N.unsqueeze(1)).to(dy_NF.dtype)
        if not ctx.gated:
            return torch.ops.aten.gelu_backward(d_active_NF, x_NF), d_gates_N, None
        gate_NF, up_NF = x_NF.chunk(2, dim=-1)
        d_gate_NF = torch.ops.aten.silu_backward(d_active_NF * up_NF, gate_NF)
        return torch.cat((d_gate_NF, d_active_NF * F.silu(gate_NF)), dim=-1), d_gates_N, None
