"""Norms are the same whichever library computes them, and the fused one is taken where it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.unions import start
from uoe_parallel.model import norm
from uoe_parallel.model.norm import Norm, NormKind, choose_norm

EPS = 0.01
KINDS: list[NormKind] = ["rms_norm", "layer_norm"]
COMPILED = "fused_layer_norm_cuda"
APEX = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm")


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    choose_norm.cache_clear()
    yield
    choose_norm.cache_clear()


def by_definition(kind: NormKind, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def fused_rms_norm_affine(
    input: Tensor,
    weight: Tensor,
    normalized_shape: torch.Size,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Stands for apex's, with its signature."""
    assert tuple(normalized_shape) == input.shape[-1:] == weight.shape and not memory_efficient
    assert eps == EPS
    return by_definition("rms_norm", input, weight, None)


def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: torch.Size,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Stands for apex's, with its signature."""
    assert tuple(normalized_shape) == input.shape[-1:] == weight.shape and not memory_efficient
    assert eps == EPS
    return by_definition("layer_norm", input, weight, bias)


def _install(monkeypatch: pytest.MonkeyPatch, *, apex: bool, compiled: bool) -> None:
    for name in APEX:
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if apex else None)
    if apex:
        for fused in (fused_rms_norm_affine, fused_layer_norm_affine):
            setattr(sys.modules[APEX[-1]], fused.__name__, fused)
    monkeypatch.setitem(sys.modules, COMPILED, ModuleType(COMPILED) if compiled else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("device", "apex", "compiled", "is_fused"),
    [
        ("cuda", True, True, True),
        ("cuda", True, False, False),
        ("cuda", False, False, False),
        ("cpu", True, True, False),
    ],
)
def test_apex_is_used_on_cuda_where_it_was_built(
    monkeypatch: pytest.MonkeyPatch,
    kind: NormKind,
    device: str,
    apex: bool,
    compiled: bool,
    is_fused: bool,
) -> None:
    _install(monkeypatch, apex=apex, compiled=compiled)
    name = f"apex.normalization's fused_{kind}_affine" if is_fused else f"torch.{kind}"
    assert choose_norm(kind, device)[1] == name


@pytest.mark.parametrize("kind", KINDS)
def test_both_compute_the_same(monkeypatch: pytest.MonkeyPatch, kind: NormKind) -> None:
    _install(monkeypatch, apex=True, compiled=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64)
    weights = torch.randn(2 if kind == "layer_norm" else 1, 8, generator=generator).double()
    results = []
    for device in ("cuda", "cpu"):
        leaves = [x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
        bias = leaves[2] if len(leaves) == 3 else None
        y = choose_norm(kind, device)[0](leaves[0], leaves[1], bias, EPS)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _asked_of(x: Tensor, kind: NormKind) -> tuple[list[tuple[NormKind, str]], Tensor]:
    """What a layer asked for, and what it made of `x`."""
    asked: list[tuple[NormKind, str]] = []

    def choose(kind: NormKind, device_type: str) -> tuple[norm.Normalize, str]:
        asked.append((kind, device_type))
        return (lambda x, weight, bias, eps: x * weight + (0 if bias is None else 1) + eps), "fake"

    group = start(1, sequence_parallel=False).tensor
    layer = Norm(kind, 8, eps=EPS, dtype=x.dtype, group=group, sequence_parallel=True)
    original, norm.choose_norm = norm.choose_norm, choose
    try:
        return asked, layer(x).detach()
    finally:
        norm.choose_norm = original


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_by_what_was_chosen_for_its_device(ranks: Ranks, kind: NormKind) -> None:
    x = torch.ones(4, 8)
    asked, y = ranks(1).run(_asked_of, x, kind)[0]
    assert asked == [(kind, "cpu")]
    assert torch.equal(y, x + (1 if kind == "layer_norm" else 0) + EPS)
