"""The norm is the same whichever library computes it, and the fused one is taken where it runs."""

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
from uoe_parallel.model.norm import RMSNorm, choose_rms_norm

EPS = 0.01
COMPILED = "fused_layer_norm_cuda"
APEX = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm")


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    choose_rms_norm.cache_clear()
    yield
    choose_rms_norm.cache_clear()


def fused_rms_norm_affine(
    input: Tensor,
    weight: Tensor,
    normalized_shape: torch.Size,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Stands for apex's, with its signature; by the definition."""
    assert tuple(normalized_shape) == input.shape[-1:] == weight.shape and not memory_efficient
    return input * torch.rsqrt(input.square().mean(-1, keepdim=True) + eps) * weight


def _install(monkeypatch: pytest.MonkeyPatch, *, apex: bool, compiled: bool) -> None:
    for name in APEX:
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if apex else None)
    if apex:
        vars(sys.modules[APEX[-1]])["fused_rms_norm_affine"] = fused_rms_norm_affine
    monkeypatch.setitem(sys.modules, COMPILED, ModuleType(COMPILED) if compiled else None)


@pytest.mark.parametrize(
    ("device", "apex", "compiled", "name"),
    [
        ("cuda", True, True, "apex.normalization's fused_rms_norm_affine"),
        ("cuda", True, False, "torch.rms_norm"),
        ("cuda", False, False, "torch.rms_norm"),
        ("cpu", True, True, "torch.rms_norm"),
    ],
)
def test_apex_is_used_on_cuda_where_it_was_built(
    monkeypatch: pytest.MonkeyPatch, device: str, apex: bool, compiled: bool, name: str
) -> None:
    _install(monkeypatch, apex=apex, compiled=compiled)
    assert choose_rms_norm(device)[1] == name


def test_both_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, apex=True, compiled=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, generator=generator, dtype=torch.float64)
    results = []
    for device in ("cuda", "cpu"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = choose_rms_norm(device)[0](leaves[0], leaves[1], EPS)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _asked_of(x: Tensor) -> tuple[list[str], Tensor]:
    """The devices that a layer asked for, and what it made of `x`."""
    asked: list[str] = []

    def choose(device_type: str) -> tuple[norm.Norm, str]:
        asked.append(device_type)
        return (lambda x, weight, eps: x * weight + eps), "a fake"

    group = start(1, sequence_parallel=False).tensor
    layer = RMSNorm(8, eps=EPS, dtype=x.dtype, group=group, sequence_parallel=True)
    original, norm.choose_rms_norm = norm.choose_rms_norm, choose
    try:
        return asked, layer(x).detach()
    finally:
        norm.choose_rms_norm = original


def test_a_layer_computes_by_what_was_chosen_for_its_device(ranks: Ranks) -> None:
    x = torch.ones(4, 8)
    asked, y = ranks(1).run(_asked_of, x)[0]
    assert asked == ["cpu"]
    assert torch.equal(y, x + EPS)
