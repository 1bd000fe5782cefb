"""Decoding with kept keys and values gives what one forward pass over everything gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.harness import Ranks
from tests.unions import AttentionSpec, Problem, build, start
from uoe_parallel.dispatch.dispatcher import run_replicated
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.backends import Backend, LoopBackend, ReferenceBackend
from uoe_parallel.experts.cache import KeyValueCache
from uoe_parallel.experts.documents import Documents
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.routing.router import Routing

SPECS = [
    AttentionSpec(keys_and_values=keys, queries_per_expert=queries, head_width=2)
    for keys in ("selected", "all")
    for queries in (1, 3)
]
PROMPTS, STEPS, LENGTH = [4, 1, 2], 5, 9
"""Tokens of each sequence's prompt, steps that follow, and length of the longest in the end."""


def _documents(lengths: list[int], length: int) -> Documents:
    ids = torch.full((len(lengths), length), -1)
    for sequence, end in enumerate(lengths):
        ids[sequence, :end] = sequence
    return Documents.from_ids(ids)


class _Block:
    """A block of a problem, routed as the problem says or dense, with tokens on every rank."""

    def __init__(
        self, problem: Problem, groups: ParallelGroups, backend: Backend, *, routed: bool
    ) -> None:
        self.union = build(problem, groups, backend=backend)
        self.group, self.routed = groups.tensor, routed
        self.tensors = problem.tensors()

    def __call__(
        self, place_SB: Tensor, documents: Documents, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Outputs of the tokens at `place_SB` of the problem's sequences."""
        t, index = self.tensors, (place_SB, torch.arange(place_SB.shape[1]))
        if not self.routed:
            return self.union(t.x[index], documents=documents, cache=cache)
        mask = t.mask[index]
        if documents.real_SB is not None:
            mask = mask & documents.real_SB.unsqueeze(-1)
        experts = partial(self.union, documents=documents, cache=cache)
        routing = Routing(mask, t.gates[index])
        return run_replicated(t.x[index], routing, experts, self.group, documents)


def _whole_and_decoded(block: _Block) -> tuple[list[Tensor], list[Tensor], KeyValueCache]:
    """Outputs of each sequence [tokens, D], by one pass and by prompts and then steps."""
    ends = [prompt + STEPS for prompt in PROMPTS]

    def places(length: int) -> Tensor:
        return torch.arange(length).unsqueeze(1).expand(length, len(PROMPTS))

    whole = block(places(LENGTH), _documents(ends, LENGTH))
    cache = KeyValueCache()
    longest = max(PROMPTS)
    filled = block(places(longest), _documents(PROMPTS, longest), cache)
    steps = []
    for step in range(STEPS):
        position_B = torch.tensor(PROMPTS) + step
        steps.append(block(position_B.unsqueeze(0), Documents.step(position_B), cache))
    decoded = [
        torch.cat([filled[:prompt, b], *(step[:, b] for step in steps)])
        for b, prompt in enumerate(PROMPTS)
    ]
    return [whole[:end, b] for b, end in enumerate(ends)], decoded, cache


def _problem(spec: AttentionSpec) -> Problem:
    return Problem(spec, LENGTH, len(PROMPTS), (0.9,), (1.0, 0.6, 0.3, 0.0))


@torch.no_grad()
def _decode(spec: AttentionSpec, tensor: int, routed: bool, exact: bool = False) -> None:
    groups = start(tensor, sequence_parallel=False)
    block = _Block(
        _problem(spec), groups, ReferenceBackend() if exact else LoopBackend(), routed=routed
    )
    whole, decoded, cache = _whole_and_decoded(block)
    for expected, found in zip(whole, decoded, strict=True):
        if exact:
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    _check_kept(block, cache, groups)


def _check_kept(block: _Block, cache: KeyValueCache, groups: ParallelGroups) -> None:
    """Of selected tokens only, unless all keys are wanted."""
    assert isinstance(block.union, SelectiveMultiHeadAttention)
    ends = torch.tensor(PROMPTS) + STEPS
    mask = block.tensors.mask.chunk(groups.tensor.size(), dim=2)[groups.tensor_rank]
    if block.union.needs_all_rows or not block.routed:
        mask = torch.ones_like(mask)
    seen_SB1 = (torch.arange(LENGTH).unsqueeze(1) < ends).unsqueeze(-1)
    assert torch.equal(cache.lengths_G, (mask & seen_SB1).sum(0).t().flatten())


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("routed", [True, False], ids=["routed", "dense"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_prompt_and_steps_give_the_whole_forward_pass(
    ranks: Ranks, spec: AttentionSpec, routed: bool, tensor: int
) -> None:
    """The last expert never takes a token, and with two ranks the second rank seldom has one."""
    ranks(tensor).run(_decode, spec, tensor, routed)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_with_the_reference_backend_to_the_bit(ranks: Ranks, spec: AttentionSpec) -> None:
    ranks(1).run(_decode, spec, 1, True, True)


@torch.no_grad()
def test_kept_rows_stay_in_their_runs_while_buffers_grow() -> None:
    cache = KeyValueCache()
    assert cache.is_empty
    wanted: list[list[float]] = [[], [], []]
    number = 0
    for lengths in ([2, 0, 1], [0, 0, 1], [1, 0, 7], [0, 0, 0]):
        rows = []
        for run, length in enumerate(lengths):
            rows += [float(number + i) for i in range(length)]
            wanted[run] += [float(number + i) for i in range(length)]
            number += length
        k = torch.tensor(rows).view(-1, 1).expand(-1, 2)
        cache.append(k, -k, torch.tensor(lengths))
        for runs in ([0, 1, 2], [2, 0], []):
            keys, values, kept = cache.read(torch.tensor(runs, dtype=torch.int64))
            assert torch.equal(keys, -values)
            found = [keys[i, :length, 1].tolist() for i, length in enumerate(kept.tolist())]
            assert found == [wanted[run] for run in runs]
    assert not cache.is_empty and cache.lengths_G.tolist() == [3, 0, 9]
