"""Time and memory of SMHA over the length of a sequence, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.benchmark.allocations import peak_memory
from uoe_parallel.benchmark.session import Session, Sizes
from uoe_parallel.benchmark.timing import ratios, time_in_turn
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.model.block import DenseBlock, RoutedBlock
from uoe_parallel.model.context import Context

LENGTHS = (1024, 2048, 4096)
SMHA = "SMHA, half of the tokens"
DENSE = "dense attention"
_PROJECTIONS = "projections"


def measure(session: Session, lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """An entry for each length and contender, forward and backward: "length", "contender",
    "seconds" of each round and "peak_bytes", which the layer adds to what lived before. On one
    rank.

    SMHA's has what it should cost by its method: mean r_i of dense attention's projections and mean
    r_i^2 of the rest of it, its score part. "mean_share" and "mean_square_share" are these means,
    over the heads, of the share r_i of all tokens that a head took; "model_seconds" has what both
    parts took in the same rounds; "ratio_to_model" is the median ratio with its spread.
    """
    assert session.groups.tensor.size() == 1, "shares are of one rank's own tokens"
    return [entry for length in lengths for entry in _of_length(session, length)]


def _of_length(session: Session, length: int) -> list[dict[str, Any]]:
    tokens = max(session.sizes.tokens, length)
    heads = session.sizes.heads
    sizes = replace(session.sizes, tokens=tokens, sequence=length, top_k=heads // 2)
    smha = session.attention(sizes, routed=True)
    dense = session.attention(sizes, routed=False)
    assert isinstance(smha, RoutedBlock)
    x_SBD = session.hidden_states(sizes, seed=1).requires_grad_()
    upstream_SBD = session.hidden_states(sizes, seed=2)
    context = session.context(sizes)
    runs = {
        SMHA: _layer(smha, x_SBD, upstream_SBD, context),
        DENSE: _layer(dense, x_SBD, upstream_SBD, context),
        _PROJECTIONS: _projections(dense, x_SBD, upstream_SBD),
    }
    seconds = time_in_turn(
        runs,
        rounds=session.rounds,
        warmup=session.warmup,
        group=session.groups.tensor,
        device=session.device,
    )
    share, square = _shares(smha, sizes)
    model = [
        share * projections + square * (whole - projections)
        for projections, whole in zip(seconds[_PROJECTIONS], seconds[DENSE], strict=True)
    ]
    entries: list[dict[str, Any]] = [
        {
            "length": length,
            "contender": name,
            "seconds": seconds[name],
            "peak_bytes": _peak(runs[name], (smha, dense), x_SBD, session),
        }
        for name in (SMHA, DENSE)
    ]
    entries[0] |= {
        "mean_share": share,
        "mean_square_share": square,
        "model_seconds": model,
        "ratio_to_model": asdict(ratios(seconds[SMHA], model)),
    }
    return entries


def _layer(
    block: DenseBlock, x_SBD: Tensor, upstream_SBD: Tensor, context: Context
) -> Callable[[], None]:
    def run() -> None:
        _forget(block, x_SBD)
        block(x_SBD, context).backward(upstream_SBD)

    return run


def _projections(block: DenseBlock, x_SBD: Tensor, upstream_SBD: Tensor) -> Callable[[], None]:
    """Dense attention's products before and after its scores."""
    union = block.experts
    assert isinstance(union, SelectiveMultiHeadAttention)
    attended_SBA = torch.ones_like(upstream_SBD).requires_grad_()
    upstream_qkv = torch.ones_like(union.qkv(x_SBD))

    def run() -> None:
        _forget(block, x_SBD, attended_SBA)
        union.qkv(x_SBD).backward(upstream_qkv)
        union.output(attended_SBA).backward(upstream_SBD)

    return run


def _forget(block: DenseBlock, *leaves: Tensor) -> None:
    for leaf in (*leaves, *block.parameters()):
        leaf.grad = None


def _shares(block: RoutedBlock, sizes: Sizes) -> tuple[float, float]:
    """Of all tokens, what a head took: mean and mean square over the heads."""
    statistics = block.statistics
    passes = statistics.scalars[0] / sizes.tokens
    share_E = statistics.counts_E / (passes * sizes.tokens)
    return float(share_E.mean()), float(share_E.square().mean())


def _peak(
    run: Callable[[], None], blocks: tuple[DenseBlock, DenseBlock], x_SBD: Tensor, session: Session
) -> int:
    # Gradients of earlier runs would be freed in this one.
    for block in blocks:
        _forget(block, x_SBD)
    return peak_memory(run, session.device)
