"""The activation between an expert's two products, and the gate on what comes of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}
"""What torch calls it."""


def is_gated(activation: str) -> bool:
    """Whether it takes two numbers for each that it returns."""
    return activation == "swiglu"


def activate(x: Tensor, activation: str) -> Tensor:
    """gelu(x), with "gelu_tanh" by GPT-2's approximation (arXiv 1606.08415); with "swiglu"
    silu(gate) * up of x = [gate | up] along the last dimension, which then is half as wide (arXiv
    2002.05202)."""
    if not is_gated(activation):
        return F.gelu(x, approximate=_APPROXIMATION[activation])
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class GatedActivation(torch.autograd.Function):
    """activate(x_NF, activation) * gates_N: of what its gradient needs only `x_NF` is kept, and the
    activation is computed again. gates_N: fp32 or fp64, and not rounded to the dtype of x_NF."""

    @staticmethod
    def forward(ctx: Any, x_NF: Tensor, gates_N: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x_NF, gates_N)
        ctx.activation = activation
        return activate(x_NF, activation).mul_(gates_N.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NF, gates_N = ctx.saved_tensors
        (dy_NF,) = grad_outputs
        d_gates_N = (dy_NF * activate(x_NF, ctx.activation)).sum(1, dtype=gates_N.dtype)
        d_active_NF = (dy_NF * gates_N.unsqueeze(1)).to(dy_NF.dtype)
        if not is_gated(ctx.activation):
            d_x_NF = torch.ops.aten.gelu_backward(
                d_active_NF, x_NF, approximate=_APPROXIMATION[ctx.activation]
            )
            return d_x_NF, d_gates_N, None
        gate_NF, up_NF = x_NF.chunk(2, dim=-1)
        d_gate_NF = torch.ops.aten.silu_backward(d_active_NF * up_NF, gate_NF)
        return torch.cat((d_gate_NF, d_active_NF * F.silu(gate_NF)), dim=-1), d_gates_N, None
