"""The activation between an expert's two products."""

from __future__ import annotations

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


def activation_gradient(dy: Tensor, x: Tensor, gated: bool) -> Tensor:
    """The gradient of `activate`'s input from that of its result."""
    if not gated:
        return torch.ops.aten.gelu_backward(dy, x)
    gate, up = x.chunk(2, dim=-1)
    d_gate = torch.ops.aten.silu_backward(dy * up, gate)
    return torch.cat((d_gate, dy * F.silu(gate)), dim=-1)
