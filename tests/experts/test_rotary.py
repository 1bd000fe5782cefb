"""Rotary positions: the rotation of complex numbers, by original position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import reference
from uoe_parallel.experts.rotary import rotate


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    st.integers(1, 4),
    st.floats(2.0, 1e6),
)
def test_equals_rotation_of_complex_numbers(positions: list[int], half: int, base: float) -> None:
    x = _random(len(positions), 3, 2 * half)
    found = rotate(x, torch.tensor(positions), base)
    for row, position in enumerate(positions):
        for head in range(3):
            wanted = reference.rotary(x[row, head], position, base)
            torch.testing.assert_close(found[row, head], wanted, rtol=1e-9, atol=1e-9)


def test_hand_values() -> None:
    quarter = torch.pi / 2
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    # Angles of position 1: 1 and base^(-1/2), here pi / 2.
    found = rotate(x, torch.tensor([1]), quarter**-2)[0, 0]
    cos, sin = torch.tensor(1.0).double().cos(), torch.tensor(1.0).double().sin()
    wanted = torch.stack([cos - 3 * sin, -4 * cos / cos, 3 * cos + sin, 2 * cos / cos])
    torch.testing.assert_close(found, wanted)


def test_position_zero_changes_nothing() -> None:
    x = _random(5, 2, 8)
    assert torch.equal(rotate(x, torch.zeros(5, dtype=torch.int64), 10000.0), x)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_products_depend_on_distance_only(first: int, second: int, shift: int) -> None:
    q, k = _random(2, 1, 1, 8)

    def product(a: int, b: int) -> torch.Tensor:
        rotated_q, rotated_k = (rotate(x, torch.tensor([p]), 500.0) for x, p in ((q, a), (k, b)))
        return (rotated_q * rotated_k).sum()

    moved = product(first + shift, second + shift)
    torch.testing.assert_close(product(first, second), moved, rtol=1e-9, atol=1e-9)


def test_leading_dimensions_follow_position() -> None:
    x = _random(3, 4, 2, 6)
    position = torch.arange(12).view(3, 4)
    found = rotate(x, position, 100.0)
    flat = rotate(x.flatten(0, 1), position.flatten(), 100.0)
    assert torch.equal(found, flat.view_as(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_tells_far_positions_apart(dtype: torch.dtype) -> None:
    """Angles are fp32: in bf16, 1000 and 1001 are the same number."""
    x = _random(1, 1, 8, dtype=torch.float32).to(dtype)
    near, far = (rotate(x, torch.tensor([p]), 10000.0) for p in (1000, 1001))
    assert near.dtype is dtype
    wanted = rotate(x.double(), torch.tensor([1001]), 10000.0)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-3
    torch.testing.assert_close(far.double(), wanted, rtol=0, atol=tolerance * 3)
    assert (near - far).abs().max() > 0.1


def test_gradient_is_the_rotation_back() -> None:
    """Of strided input too; heads that are kept keep theirs, and autograd keeps positions alone."""
    x = _random(3, 4, 4, 6).transpose(0, 1).requires_grad_()
    position = torch.tensor([7, 0, 3]).expand(4, 3)

    def run(x: torch.Tensor) -> torch.Tensor:
        return rotate(x, position, 100.0, kept=2)

    assert torch.autograd.gradcheck(run, x)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda saved: saved):
        found = run(x)
    assert [saved.dtype for saved in kept] == [torch.int64]
    assert torch.equal(found[..., 2:, :], x[..., 2:, :])
    assert torch.equal(found[..., :2, :], rotate(x[..., :2, :], position, 100.0))


def test_positions_broadcast() -> None:
    x, position = _random(5, 2, 3, 1, 6), torch.arange(5)
    found = rotate(x, position.view(-1, 1, 1), 100.0)
    assert torch.equal(found, rotate(x, position.view(-1, 1, 1).expand(5, 2, 3), 100.0))
