"""Attention over padded runs: the CPU's causal kernel in pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unions import normal
from uoe_parallel.experts import padded
from uoe_parallel.experts.backends import ReferenceBackend
from uoe_parallel.experts.padded import PaddedAttention

LENGTHS = [9, 0, 16, 5, 1, 33, 6, 17]


def _run(
    backend: PaddedAttention | ReferenceBackend, lengths: list[int], heads: int
) -> list[Tensor]:
    """Values and gradients."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = sum(lengths)
    q, k, v = (
        normal(generator, rows, *shape).requires_grad_() for shape in ((heads, 4), (4,), (4,))
    )
    out = backend.attention(q, k, v, torch.tensor(lengths), causal=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), normal(generator, *out.shape))]


@pytest.mark.parametrize(("stretch", "heads"), [(1, 1), (2, 2), (3, 1), (8, 2)])
def test_pieces_make_up_the_whole(
    monkeypatch: pytest.MonkeyPatch, stretch: int, heads: int
) -> None:
    """Runs of several length classes, some empty, that end within a stretch and at its end."""
    monkeypatch.setattr(padded, "_STRETCH", stretch)
    wanted = _run(ReferenceBackend(), LENGTHS, heads)
    for found, exact in zip(_run(PaddedAttention(), LENGTHS, heads), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 900), min_size=1, max_size=5))
def test_every_place_sees_those_before_it_once(lengths: list[int]) -> None:
    """And its own stretch first; a run takes part in the pieces that begin before its end."""
    lengths.sort(reverse=True)
    longest = lengths[0]
    seen = torch.zeros(longest, longest, dtype=torch.int64)
    begun = torch.zeros(longest, dtype=torch.bool)
    calls = 0
    for runs, later, keys, causal in padded.causal_pieces(torch.tensor(lengths)):
        assert runs.stop == sum(length > later.start for length in lengths) > 0
        assert causal == (later == keys) and bool(begun[later].all()) != causal
        begun[later] = True
        size = (later.stop - later.start, keys.stop - keys.start)
        seen[later, keys] += torch.ones(size, dtype=torch.int64).tril() if causal else 1
        calls += 1
    assert torch.equal(seen, torch.ones_like(seen).tril())
    # One for each stretch, and one to join it to another.
    assert calls == max(0, 2 * -(-longest // padded._STRETCH) - 1)


def test_a_run_that_is_no_number_stays_alone() -> None:
    """Runs are padded with rows of their own, and a run without a row with somebody's: nothing of
    them comes through."""
    lengths = [3, 0, 2, 4]
    generator = torch.Generator().manual_seed(0)
    tensors = [normal(generator, 9, *shape) for shape in ((2, 4), (4,), (4,))]
    lost = slice(3, 5)

    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        lengths_G = torch.tensor(lengths)
        out = PaddedAttention().attention(leaves[0], leaves[1], leaves[2], lengths_G, causal=True)
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return [torch.cat((x[: lost.start], x[lost.stop :])) for x in (out.detach(), *gradients)]

    wanted = run(*tensors)
    for x in tensors:
        x[lost] = torch.nan
    for found, exact in zip(run(*tensors), wanted, strict=True):
        assert torch.equal(found, exact)


def test_lengths_are_copied_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(Tensor, "cpu", lambda x: copies.append(x.shape) or x.to("cpu"))
    lengths_G = torch.tensor(LENGTHS)
    padding = padded._Padding(lengths_G, lengths_G)
    assert copies == [(2, len(LENGTHS))]
    assert padding.shapes_C == [(1, 33), (2, 17), (2, 9), (1, 5), (2, 1)]
