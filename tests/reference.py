"""What dense and routed blocks compute, written from the definitions: slow, plain, obvious.

An expert is a slice of the dense block, and a routed block is y_t = sum_i g_i E_i(x_t) + b over
the experts i chosen for token t. Nothing here uses the package's arithmetic: of the package there
are only the two containers of full dense weights.

x: [S, B, D]; mask and gates: [S, B, E].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uoe_parallel.experts.attention import DenseAttentionWeights
from uoe_parallel.experts.mlp import DenseMLPWeights


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.T
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def dense_mlp(x: Tensor, w: DenseMLPWeights) -> Tensor:
    """act(x W1 + b1) W2 + b2."""
    hidden = linear(x, w.up_FD, w.up_bias_F)
    if w.gate_FD is None:
        hidden = gelu(hidden)
    else:
        hidden = silu(linear(x, w.gate_FD, w.gate_bias_F)) * hidden
    return linear(hidden, w.down_DF, w.output_bias_D)


def mlp_expert(x: Tensor, w: DenseMLPWeights, expert: int, num_experts: int) -> Tensor:
    """E_i: the dense block of the i-th part of the hidden units, without the output bias."""
    width = w.up_FD.shape[0] // num_experts
    part = slice(expert * width, (expert + 1) * width)
    expert_weights = DenseMLPWeights(
        up_FD=w.up_FD[part],
        down_DF=w.down_DF[:, part],
        gate_FD=None if w.gate_FD is None else w.gate_FD[part],
        up_bias_F=None if w.up_bias_F is None else w.up_bias_F[part],
        gate_bias_F=None if w.gate_bias_F is None else w.gate_bias_F[part],
    )
    return dense_mlp(x, expert_weights)


def routed_mlp(x: Tensor, mask: Tensor, gates: Tensor, w: DenseMLPWeights) -> Tensor:
    rows = []
    length, batch, num_experts = mask.shape
    for t in range(length):
        for b in range(batch):
            y = torch.zeros_like(x[t, b]) if w.output_bias_D is None else w.output_bias_D
            for i in range(num_experts):
                if mask[t, b, i]:
                    y = y + gates[t, b, i] * mlp_expert(x[t, b], w, i, num_experts)
            rows.append(y)
    return torch.stack(rows).view_as(x)


def rotary(x: Tensor, position: int, base: float) -> Tensor:
    """Turn the complex numbers x_j + i x_(j + d/2) of x [d] by position * base^(-2j/d)."""
    half = x.shape[0] // 2
    angle = torch.tensor(
        [position * base ** (-2 * j / x.shape[0]) for j in range(half)], dtype=x.dtype
    )
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag))


def _head(x: Tensor, weight: Tensor, bias: Tensor | None, head: int, width: int) -> Tensor:
    rows = slice(head * width, (head + 1) * width)
    return linear(x, weight[rows], None if bias is None else bias[rows])


def _head_at(
    x: Tensor, weight: Tensor, bias: Tensor | None, head: int, width: int, base: float
) -> Tensor:
    """A head of every position of x [S, D], each turned by its position."""
    y = _head(x, weight, bias, head, width)
    return torch.stack([rotary(row, t, base) for t, row in enumerate(y)])


def dense_attention(x: Tensor, w: DenseAttentionWeights, head_width: int, base: float) -> Tensor:
    """Causal grouped-query attention with rotary positions."""
    length, batch, _ = x.shape
    num_heads, num_kv_heads = w.q_AD.shape[0] // head_width, w.k_CD.shape[0] // head_width
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    sequences = []
    for b in range(batch):
        heads = []
        for h in range(num_heads):
            kv = h * num_kv_heads // num_heads
            q = _head_at(x[:, b], w.q_AD, w.q_bias_A, h, head_width, base)
            k = _head_at(x[:, b], w.k_CD, w.k_bias_C, kv, head_width, base)
            v = _head(x[:, b], w.v_CD, w.v_bias_C, kv, head_width)
            scores = (q @ k.T / math.sqrt(head_width)).masked_fill(later, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        sequences.append(linear(torch.cat(heads, dim=-1), w.output_DA, w.output_bias_D))
    return torch.stack(sequences, dim=1)


def routed_attention(
    x: Tensor,
    mask: Tensor,
    gates: Tensor,
    w: DenseAttentionWeights,
    head_width: int,
    base: float,
) -> Tensor:
    """Expert i attends among its own selected tokens only, turned by their own positions."""
    length, batch, num_experts = mask.shape
    queries = w.q_AD.shape[0] // head_width // num_experts
    bias = torch.zeros_like(x[0, 0]) if w.output_bias_D is None else w.output_bias_D
    y = [[bias for _ in range(batch)] for _ in range(length)]
    for b in range(batch):
        for i in range(num_experts):
            keys, values = [], []
            for t in range(length):
                if not mask[t, b, i]:
                    continue
                key = _head(x[t, b], w.k_CD, w.k_bias_C, i, head_width)
                keys.append(rotary(key, t, base))
                values.append(_head(x[t, b], w.v_CD, w.v_bias_C, i, head_width))
                for h in range(i * queries, (i + 1) * queries):
                    q = rotary(_head(x[t, b], w.q_AD, w.q_bias_A, h, head_width), t, base)
                    weights = (torch.stack(keys) @ q / math.sqrt(head_width)).softmax(0)
                    out = w.output_DA[:, h * head_width : (h + 1) * head_width]
                    y[t][b] = y[t][b] + gates[t, b, i] * (out @ (weights @ torch.stack(values)))
    return torch.stack([torch.stack(row) for row in y])
