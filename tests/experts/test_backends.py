"""Every backend computes the same numbers, forward and backward, empty runs included."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.harness import Ranks
from tests.unions import (
    AttentionSpec,
    MLPSpec,
    Outcome,
    Problem,
    Spec,
    assert_equal_to,
    expected_routed,
    normal,
    run_routed,
    start,
)
from uoe_parallel.config.schema import ExpertProducts
from uoe_parallel.errors import UserError
from uoe_parallel.experts import timing
from uoe_parallel.experts.backends import (
    Backend,
    FlashBackend,
    FlashLoopBackend,
    GroupedBackend,
    Keys,
    LoopBackend,
    PaddedAttention,
    ReferenceBackend,
    available_backends,
    choose_backend,
    pick_backend,
)
from uoe_parallel.parallel.layout import ParallelLayout


class Tolerance(NamedTuple):
    rtol: float
    atol: float


FP32 = Tolerance(1e-4, 1e-5)
FP64 = Tolerance(1e-10, 1e-12)
BACKENDS = [
    pytest.param(GroupedBackend(), torch.float32, FP32, id="grouped-fp32"),
    pytest.param(LoopBackend(), torch.float32, FP32, id="loop-fp32"),
    pytest.param(LoopBackend(), torch.float64, FP64, id="loop-fp64"),
    pytest.param(ReferenceBackend(), torch.float64, FP64, id="reference-fp64"),
]
counts = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=6)


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [normal(generator, *shape) for shape in shapes]


def _check(
    found: Tensor, wanted: Tensor, leaves: list[Tensor], exact: list[Tensor], tolerance: Tolerance
) -> None:
    """Same values and gradients, and a gradient at all: without one, a rank that got no rows
    would stay out of the collectives of the backward pass."""
    assert found.shape == wanted.shape
    assert found.requires_grad
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance.rtol, atol=tolerance.atol)
    gradients = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    exact_gradients = torch.autograd.grad(wanted, exact, upstream.double(), materialize_grads=True)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(
            gradient.double(), exact_gradient, rtol=tolerance.rtol, atol=tolerance.atol
        )


def _products(x_NK: Tensor, w_EKM: Tensor, counts_E: list[int]) -> Tensor:
    """By a sum over experts of products masked to the expert's rows."""
    expert_N = torch.tensor([e for e, count in enumerate(counts_E) for _ in range(count)])
    y = x_NK.new_zeros(x_NK.shape[0], w_EKM.shape[2])
    for e, w_KM in enumerate(w_EKM):
        y = y + (expert_N == e).to(x_NK.dtype).unsqueeze(1) * (x_NK @ w_KM)
    return y


def _attention(
    q_NHd: Tensor,
    k_Md: Tensor,
    v_Md: Tensor,
    lengths_G: list[int],
    *,
    causal: bool = True,
    keys: Keys | None = None,
) -> Tensor:
    """By one mask over all rows: of the same run, and if causal not later."""
    run_N = torch.tensor([g for g, length in enumerate(lengths_G) for _ in range(length)])
    key_lengths = lengths_G if keys is None else keys.lengths_G.tolist()
    run_M = torch.tensor([g for g, length in enumerate(key_lengths) for _ in range(length)])
    place_M = torch.tensor([place for length in key_lengths for place in range(length)])
    visible = run_N.unsqueeze(1) == run_M
    if causal:
        place_N = place_M if keys is None else keys.place_N
        visible = visible & (place_M <= place_N.unsqueeze(1))
    scores = torch.einsum("nhd,md->hnm", q_NHd, k_Md) / q_NHd.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hnm,md->nhd", weights, v_Md)


@st.composite
def attentions(draw: st.DrawFn) -> tuple[list[int], Keys | None]:
    """Lengths of runs, and the keys of runs that have others than the queries' own rows."""
    key_lengths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 9]), min_size=1, max_size=6))
    if draw(st.booleans()):
        return key_lengths, None
    chosen = [[p for p in range(length) if draw(st.booleans())] for length in key_lengths]
    places = torch.tensor([place for run in chosen for place in run], dtype=torch.int64)
    return [len(run) for run in chosen], Keys(torch.tensor(key_lengths), places)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@settings(max_examples=25)
@given(counts_E=counts, transposed=st.booleans(), widths=st.sampled_from([(8, 16), (5, 3)]))
def test_products(
    backend: Backend,
    dtype: torch.dtype,
    tolerance: Tolerance,
    counts_E: list[int],
    transposed: bool,
    widths: tuple[int, int],
) -> None:
    """Weights also in the strides in which Megatron's linears hold them, and of any width."""
    x, w, y = _leaves(
        (sum(counts_E), widths[0]), (len(counts_E), *widths), (sum(counts_E), widths[1])
    )
    slices = w.to(dtype)
    if transposed:
        slices = slices.transpose(1, 2).contiguous().transpose(1, 2)
    count_of = torch.tensor(counts_E)
    found = backend.products(x.to(dtype), slices, count_of)
    check = partial(torch.testing.assert_close, rtol=tolerance.rtol, atol=tolerance.atol)
    check(found.double(), _products(x, w, counts_E))
    blocks = zip(y.split(counts_E), x.split(counts_E), strict=True)
    wanted = torch.stack([y_block.t() @ x_block for y_block, x_block in blocks])
    out = torch.full(wanted.transpose(1, 2).shape, torch.nan, dtype=dtype).transpose(1, 2)
    backend.outer_products(out, y.to(dtype), x.to(dtype), count_of)
    check(out.double(), wanted)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_products_of_all_rows(backend: Backend, dtype: torch.dtype, tolerance: Tolerance) -> None:
    """With a part of each slice's columns, as they lie in a weight; also of no rows."""
    for rows in (3, 0):
        x, w = _leaves((rows, 8), (4, 6, 8))
        exact = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        leaves = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        found = backend.all_products(leaves[0], leaves[1][:, 2:].transpose(1, 2))
        wanted = torch.einsum("nk,emk->enm", exact[0], exact[1][:, 2:])
        _check(found, wanted, leaves, exact, tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@settings(max_examples=40)
@given(runs=attentions(), heads=st.integers(1, 3), causal=st.booleans())
def test_attention(
    backend: Backend,
    dtype: torch.dtype,
    tolerance: Tolerance,
    runs: tuple[list[int], Keys | None],
    heads: int,
    causal: bool,
) -> None:
    lengths_G, keys = runs
    rows = sum(lengths_G)
    num_keys = rows if keys is None else int(keys.lengths_G.sum())
    tensors = _leaves((rows, heads, 4), (num_keys, 4), (num_keys, 4))
    exact = [t.clone().requires_grad_() for t in tensors]
    q, k, v = leaves = [t.to(dtype).requires_grad_() for t in tensors]
    found = backend.attention(q, k, v, torch.tensor(lengths_G), causal=causal, keys=keys)
    wanted = _attention(exact[0], exact[1], exact[2], lengths_G, causal=causal, keys=keys)
    _check(found, wanted, leaves, exact, tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 1, 5, 5], []])
def test_attention_to_kept_keys(
    backend: Backend, dtype: torch.dtype, tolerance: Tolerance, lengths: list[int]
) -> None:
    """Each query has its own, as if it were the last row of a run; what follows is not seen."""
    rows = len(lengths)
    q, k, v = _leaves((rows, 2, 4), (rows, 6, 4), (rows, 6, 4))
    own = torch.arange(6) < torch.tensor(lengths, dtype=torch.int64).unsqueeze(1)
    keys = Keys(torch.tensor(lengths, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
    wanted = _attention(q, k[own], v[own], [1] * rows, causal=False, keys=keys)
    found = backend.attention_to_kept(q.to(dtype), k.to(dtype), v.to(dtype), keys.lengths_G)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance.rtol, atol=tolerance.atol)


def test_variable_length_kernel_is_told_runs_and_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself needs a GPU: a plain function stands in for it."""

    def plain(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        key_starts: Tensor,
        *longest: int,
        **how: Any,
    ) -> Tensor:
        lengths, key_lengths = starts.diff(), key_starts.diff()
        assert starts.dtype == key_starts.dtype == torch.int32 and how["enable_gqa"]
        assert longest == (int(lengths.max()), int(key_lengths.max()))
        causal = {(-1, 0): True, (-1, -1): False}[how["window_size"]]
        keys = None if causal else Keys(key_lengths.long(), torch.zeros(len(q)))
        return _attention(q, k[:, 0], v[:, 0], lengths.tolist(), causal=causal, keys=keys)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain)
    lengths, others = [3, 0, 2], Keys(torch.tensor([4, 1, 2]), torch.tensor([0, 2, 3, 0, 1]))
    q, k, v = _leaves((5, 2, 4), (7, 4), (7, 4))
    for causal in (True, False):
        for keys in (None, others):
            k_M, v_M = (k, v) if keys else (k[:5], v[:5])
            found = FlashBackend().attention(
                q, k_M, v_M, torch.tensor(lengths), causal=causal, keys=keys
            )
            wanted = _attention(q, k_M, v_M, lengths, causal=causal, keys=keys)
            torch.testing.assert_close(found, wanted, rtol=FP64.rtol, atol=FP64.atol)


@pytest.mark.parametrize("causal", [True, False])
def test_equal_to_one_dense_call_when_all_rows_are_one_run(causal: bool) -> None:
    q, k, v = _leaves((7, 2, 4), (7, 4), (7, 4))
    dense = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.expand(2, 7, 4), v.expand(2, 7, 4), is_causal=causal
    ).transpose(0, 1)
    for backend in (LoopBackend(), ReferenceBackend()):
        found = backend.attention(q, k, v, torch.tensor([7]), causal=causal)
        torch.testing.assert_close(found, dense, rtol=FP64.rtol, atol=FP64.atol)


@settings(max_examples=25)
@given(lengths_G=counts, cut=st.integers(1, 12))
def test_reference_gives_a_row_the_same_bits_whatever_comes_later(
    lengths_G: list[int], cut: int
) -> None:
    """Dropping the last rows of a block, or all blocks after it, changes no bit before."""
    rows, kept = sum(lengths_G), min(cut, sum(lengths_G))
    kept_lengths, left = [], kept
    for length in lengths_G:
        kept_lengths.append(min(length, left))
        left -= kept_lengths[-1]
    q, k, v, w = _leaves((rows, 2, 4), (rows, 4), (rows, 4), (len(lengths_G), 4, 3))
    backend, whole, part = ReferenceBackend(), torch.tensor(lengths_G), torch.tensor(kept_lengths)
    attended = backend.attention(q, k, v, whole, causal=True)[:kept]
    found = backend.attention(q[:kept], k[:kept], v[:kept], part, causal=True)
    assert torch.equal(found, attended)
    assert torch.equal(backend.products(k[:kept], w, part), backend.products(k, w, whole)[:kept])
    assert torch.equal(backend.all_products(k[:kept], w), backend.all_products(k, w)[:, :kept])


@pytest.mark.parametrize("causal", [True, False])
def test_reference_gives_a_run_the_same_bits_whatever_is_beside_it(causal: bool) -> None:
    lengths = [3, 0, 4, 2]
    q, k, v = _leaves((9, 2, 4), (9, 4), (9, 4))
    whole = ReferenceBackend().attention(q, k, v, torch.tensor(lengths), causal=causal)
    for run, length in enumerate(lengths):
        rows = slice(sum(lengths[:run]), sum(lengths[: run + 1]))
        alone = torch.tensor([length])
        found = ReferenceBackend().attention(q[rows], k[rows], v[rows], alone, causal=causal)
        assert torch.equal(found, whole[rows])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((backend.values[0], backend.values[1]) for backend in BACKENDS), (FlashBackend(), None)],
)
@pytest.mark.parametrize("causal", [True, False])
def test_dropout_of_attention_probabilities(
    backend: Backend, dtype: torch.dtype | None, causal: bool
) -> None:
    """Of each row, head and run on its own; the kept ones are scaled to keep their mean."""
    lengths, share = [9, 0, 16], 0.3
    q, k, _ = (t.to(dtype or torch.float32) for t in _leaves((25, 2, 16), (25, 16), (25, 16)))
    # With the rows of an identity as values, what comes out are the probabilities.
    v = torch.cat([torch.eye(length, 16, dtype=q.dtype) for length in lengths])
    expected = PaddedAttention().attention(q, k, v, torch.tensor(lengths), causal=causal)
    torch.manual_seed(0)
    found = backend.attention(q, k, v, torch.tensor(lengths), causal=causal, dropout=share)
    visible = expected > 0
    dropped = visible & (found == 0)
    wanted = (expected / (1 - share)).masked_fill(dropped, 0)
    torch.testing.assert_close(found, wanted, rtol=FP32.rtol, atol=FP32.atol)
    assert dropped.sum() / visible.sum() == pytest.approx(share, abs=0.1)
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    assert not torch.equal(dropped[:9], dropped[9:18])


UNIONS: list[Spec] = [
    MLPSpec(activation="gelu_tanh", hidden_size=8, expert_width=4),
    MLPSpec(activation="swiglu", hidden_size=8, expert_width=8, bias=False),
    AttentionSpec(num_experts=4),
    AttentionSpec(num_experts=4, queries_per_expert=2, bias=False),
    AttentionSpec(num_experts=4, causal=False),
    AttentionSpec(num_experts=4, queries_per_expert=2, keys_and_values="all"),
]
PROBLEMS = [
    Problem(spec, 8, 2, (1.0, 0.2), density, seed=seed)
    for seed, spec in enumerate(UNIONS)
    for density in [(0.8, 0.0, 0.3, 1.0), (0.5, 0.5, 0.0, 0.0)]
]


def _run_unions(backend: Backend, dtype: torch.dtype, layout: ParallelLayout) -> list[Outcome]:
    groups = start(layout.tensor, sequence_parallel=layout.sequence_parallel)
    return [run_routed(problem, groups, dtype, backend) for problem in PROBLEMS]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_unions_compute_the_reference_with_every_backend(
    ranks: Ranks, backend: Backend, dtype: torch.dtype, tolerance: Tolerance
) -> None:
    """With weights as they lie in Megatron's linears, an expert without rows and a rank too."""
    layout = ParallelLayout(2, 2, 1, 2, sequence_parallel=True, zero_stage=0)
    by_rank = ranks(2).run(_run_unions, backend, dtype, layout)
    for i, problem in enumerate(PROBLEMS):
        found = [outcomes[i] for outcomes in by_rank]
        assert_equal_to(
            expected_routed(problem),
            found,
            layout,
            problem,
            rtol=tolerance.rtol,
            atol=tolerance.atol,
        )


def test_backends_by_device_and_precision() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    loop, half = {"loop": LoopBackend}, {"grouped": FlashBackend, "loop": FlashLoopBackend}
    both = {"grouped": GroupedBackend, "loop": LoopBackend}
    for device, dtype, wanted in (
        (cpu, torch.float64, loop),
        (cuda, torch.float64, loop),
        (cpu, torch.float32, both),
        (cuda, torch.float32, loop),
        (cpu, torch.bfloat16, both),
        (cuda, torch.bfloat16, half),
    ):
        found = available_backends(device, dtype)
        assert {name: type(backend) for name, backend in found.items()} == wanted


def test_what_may_be_chosen_on_a_cpu_is_held_against_the_reference() -> None:
    tested = {(type(case.values[0]), case.values[1]) for case in BACKENDS}
    for dtype in (torch.float32, torch.float64):
        found = available_backends(torch.device("cpu"), dtype).values()
        assert {(type(backend), dtype) for backend in found} <= tested


def _pick(products: ExpertProducts, dtype: torch.dtype, loop_by_rank: list[float]) -> list[str]:
    """What is picked where a grouped product seems to take a second and a loop so long as given,
    and for what number of products it was asked."""
    groups = start(dist.get_world_size(), sequence_parallel=False)
    asked: list[str] = []

    def seem(backend: Backend, device: torch.device, dtype: torch.dtype) -> float:
        is_loop = type(backend) is LoopBackend
        asked.append("loop" if is_loop else "grouped")
        return loop_by_rank[groups.rank] if is_loop else 1.0

    original, timing.seconds_of_product = timing.seconds_of_product, seem
    try:
        backend, name = pick_backend(torch.device("cpu"), dtype, products, groups.world)
    finally:
        timing.seconds_of_product = original
    return [type(backend).__name__, name, *sorted(set(asked))]


@pytest.mark.parametrize(
    ("loop_by_rank", "picked"),
    [
        ([0.5, 4.0], ["LoopBackend", "loop (0.50 x grouped)"]),
        ([4.0, 0.5], ["GroupedBackend", "grouped (0.25 x loop)"]),
    ],
)
def test_all_ranks_take_what_was_faster_on_the_first(
    ranks: Ranks, loop_by_rank: list[float], picked: list[str]
) -> None:
    found = ranks(2).run(_pick, "auto", torch.float32, loop_by_rank)
    assert found == [[*picked, "grouped", "loop"]] * 2


@pytest.mark.parametrize(
    ("products", "dtype", "picked"),
    [
        ("loop", torch.float32, ["LoopBackend", "loop"]),
        ("grouped", torch.float32, ["GroupedBackend", "grouped"]),
        ("auto", torch.float64, ["LoopBackend", "loop"]),
    ],
)
def test_nothing_is_timed_where_there_is_nothing_to_choose(
    ranks: Ranks, products: ExpertProducts, dtype: torch.dtype, picked: list[str]
) -> None:
    assert ranks(1).run(_pick, products, dtype, [1.0])[0] == picked


def test_products_that_a_device_has_not_are_refused() -> None:
    with pytest.raises(UserError, match=r"expert_products=grouped is not for .*cuda.* or loop"):
        pick_backend(torch.device("cuda"), torch.float32, "grouped", None)


def test_timing_runs_every_backend_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    found = available_backends(torch.device("cpu"), torch.float32)
    seconds = timing.time_products(found, torch.device("cpu"), torch.float32, None)
    assert seconds.keys() == found.keys() and all(map(math.isfinite, seconds.values()))
    assert type(choose_backend(torch.device("cpu"), torch.float32)) in map(type, found.values())
    assert torch.equal(torch.get_rng_state(), before)


@given(counts_E=counts, seed=st.integers(0, 9))
def test_grouped_products_have_the_bits_of_single_ones(counts_E: list[int], seed: int) -> None:
    """On a CPU, where a run takes whichever are faster when it starts."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(counts_E)
    x, y = (torch.randn(sum(counts_E), width, generator=generator) for width in (16, 24))
    w = torch.randn(len(counts_E), 16, 24, generator=generator)
    loop, grouped = LoopBackend(), GroupedBackend()
    assert torch.equal(loop.products(x, w, counts), grouped.products(x, w, counts))
    of_loop, of_grouped = torch.empty(2, len(counts_E), 24, 16)
    loop.outer_products(of_loop, y, x, counts)
    grouped.outer_products(of_grouped, y, x, counts)
    assert torch.equal(of_loop, of_grouped)
