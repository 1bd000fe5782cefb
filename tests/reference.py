"""What dense and routed blocks compute, written from the definitions: slow, plain, obvious.

An expert is a slice of the dense block, and a routed block is y_t = sum_i g_i E_i(x_t) + b over
the experts i chosen for token t. Nothing here uses the package's arithmetic: of the package there
are only the two containers of full dense weights.

x: [S, B, D]; mask and gates: [S, B, E]; ids: [B, S], the document of each token, -1 for padding.
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


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's."""
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def dense_mlp(x: Tensor, w: DenseMLPWeights, activation: str) -> Tensor:
    """act(x W1 + b1) W2 + b2."""
    hidden = linear(x, w.up_FD, w.up_bias_F)
    if activation == "gelu":
        hidden = gelu(hidden)
    elif activation == "gelu_tanh":
        hidden = gelu_tanh(hidden)
    else:
        assert activation == "swiglu" and w.gate_FD is not None
        hidden = silu(linear(x, w.gate_FD, w.gate_bias_F)) * hidden
    return linear(hidden, w.down_DF, w.output_bias_D)


def mlp_expert(
    x: Tensor, w: DenseMLPWeights, activation: str, expert: int, num_experts: int
) -> Tensor:
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
    return dense_mlp(x, expert_weights, activation)


def routed_mlp(
    x: Tensor, mask: Tensor, gates: Tensor, w: DenseMLPWeights, activation: str
) -> Tensor:
    rows = []
    length, batch, num_experts = mask.shape
    for t in range(length):
        for b in range(batch):
            y = torch.zeros_like(x[t, b]) if w.output_bias_D is None else w.output_bias_D
            for i in range(num_experts):
                if mask[t, b, i]:
                    expert = mlp_expert(x[t, b], w, activation, i, num_experts)
                    y = y + gates[t, b, i] * expert
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


def places(ids: Tensor) -> list[int]:
    """Each token's place in its document, of the ids [S] of a sequence."""
    tokens = ids.tolist()
    return [t - tokens.index(document) for t, document in enumerate(tokens)]


def _sees(ids: Tensor, causal: bool, t: int) -> list[int]:
    """The tokens of a sequence that token t attends to, itself among them."""
    return [
        u for u in range(len(ids)) if ids[u] == ids[t] and ids[u] >= 0 and (u <= t or not causal)
    ]


def _head(x: Tensor, weight: Tensor, bias: Tensor | None, head: int, width: int) -> Tensor:
    rows = slice(head * width, (head + 1) * width)
    return linear(x, weight[rows], None if bias is None else bias[rows])


def _turned(rows: Tensor, ids: Tensor, base: float | None) -> Tensor:
    """Rows of every token of a sequence, each turned by its place in its document if positions are
    rotary."""
    if base is None:
        return rows
    turned = [rotary(row, place, base) for row, place in zip(rows, places(ids), strict=True)]
    return torch.stack(turned)


def dense_attention(
    x: Tensor,
    ids: Tensor,
    w: DenseAttentionWeights,
    head_width: int,
    base: float | None,
    causal: bool,
) -> Tensor:
    """Grouped-query attention within documents, with rotary positions unless `base` is None.
    Padding gets the bias."""
    length, batch, _ = x.shape
    num_heads, num_kv_heads = w.q_AD.shape[0] // head_width, w.k_CD.shape[0] // head_width
    sequences = []
    for b in range(batch):
        visible = torch.zeros(length, length, dtype=torch.bool)
        for t in range(length):
            visible[t, _sees(ids[b], causal, t)] = True
        padding = ~visible.any(1, keepdim=True)
        heads = []
        for h in range(num_heads):
            kv = h * num_kv_heads // num_heads
            q = _turned(_head(x[:, b], w.q_AD, w.q_bias_A, h, head_width), ids[b], base)
            k = _turned(_head(x[:, b], w.k_CD, w.k_bias_C, kv, head_width), ids[b], base)
            v = _head(x[:, b], w.v_CD, w.v_bias_C, kv, head_width)
            scores = (q @ k.T / math.sqrt(head_width)).masked_fill(~(visible | padding), -math.inf)
            heads.append((scores.softmax(-1) @ v).masked_fill(padding, 0))
        sequences.append(linear(torch.cat(heads, dim=-1), w.output_DA, w.output_bias_D))
    return torch.stack(sequences, dim=1)


def routed_attention(
    x: Tensor,
    ids: Tensor,
    mask: Tensor,
    gates: Tensor,
    w: DenseAttentionWeights,
    head_width: int,
    base: float | None,
    causal: bool,
    all_keys: bool,
) -> Tensor:
    """Expert i's tokens attend to those of their document that it selected too, or to all, turned
    by their own places if positions are rotary."""
    length, batch, num_experts = mask.shape
    queries = w.q_AD.shape[0] // head_width // num_experts
    bias = torch.zeros_like(x[0, 0]) if w.output_bias_D is None else w.output_bias_D
    y = [[bias for _ in range(batch)] for _ in range(length)]
    for b in range(batch):
        for i in range(num_experts):
            keys = _turned(_head(x[:, b], w.k_CD, w.k_bias_C, i, head_width), ids[b], base)
            values = _head(x[:, b], w.v_CD, w.v_bias_C, i, head_width)
            for h in range(i * queries, (i + 1) * queries):
                q = _turned(_head(x[:, b], w.q_AD, w.q_bias_A, h, head_width), ids[b], base)
                out = w.output_DA[:, h * head_width : (h + 1) * head_width]
                for t in mask[:, b, i].nonzero().flatten().tolist():
                    seen = [u for u in _sees(ids[b], causal, t) if all_keys or mask[u, b, i]]
                    weights = (keys[seen] @ q[t] / math.sqrt(head_width)).softmax(0)
                    y[t][b] = y[t][b] + gates[t, b, i] * (out @ (weights @ values[seen]))
    return torch.stack([torch.stack(row) for row in y])
