"""Rules that need whole sequences, causality of the whole model, and tokens on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import Ranks
from tests.model.cases import build_model, own_shard, random_tokens, start
from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.backends import GroupedBackend, ReferenceBackend
from uoe_parallel.routing.units import Units

CHANGED_POSITION = 9


def parallel(tensor: int, sequence_parallel: bool) -> dict[str, Any]:
    return {"parallel": {"tensor": tensor, "sequence_parallel": sequence_parallel}}


class BestOfSequence:
    """Each expert takes its best quarter of a sequence: a rule that needs the whole of it."""

    per_unit = False
    looks_ahead = True
    balances = True

    def __call__(self, scores_SBE: Tensor, units: Units) -> Tensor:
        length = scores_SBE.shape[0]
        best = scores_SBE.topk(length // 4, dim=0).indices
        return torch.zeros_like(scores_SBE, dtype=torch.bool).scatter_(0, best, True)


def output_with_whole_sequence_rule(config: RunConfig, kind: str) -> tuple[Tensor, int]:
    """This rank's part of a block's output, and how many pairs were routed."""
    groups = start(config)
    model = build_model(config, groups, torch.float64)
    block = model.routed_blocks()[f"layers.1.{kind}"]
    block.router.levels["router_weight"].selection = BestOfSequence()
    length = config.model.sequence_length
    shape = (length, 4, config.model.hidden_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output = block(own_shard(x, groups), model.context((4, length), None, x.device)).detach()
    return output, int(block.statistics.counts_E.sum())


@pytest.mark.parametrize("kind", ["feed_forward", "attention"])
def test_rules_that_need_a_whole_sequence_see_it_under_every_layout(
    ranks: Ranks, kind: str
) -> None:
    expected, pairs = ranks(1).run(output_with_whole_sequence_rule, tiny_config(), kind)[0]
    for tensor in (2, 4):
        config = tiny_config(**parallel(tensor, sequence_parallel=True))
        shards = ranks(tensor).run(output_with_whole_sequence_rule, config, kind)
        whole = torch.cat([shard for shard, _ in shards])
        torch.testing.assert_close(whole, expected, rtol=1e-11, atol=1e-12)
        assert sum(count for _, count in shards) == pairs
        config = tiny_config(**parallel(tensor, sequence_parallel=False))
        for whole, count in ranks(tensor).run(output_with_whole_sequence_rule, config, kind):
            torch.testing.assert_close(whole, expected, rtol=1e-11, atol=1e-12)
            assert count == pairs


def model_before_and_after(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Hidden states [S, B, D] in fp64 for tokens and for tokens with one changed."""
    groups = start(config)
    model = build_model(config, groups, torch.float64, ReferenceBackend())
    tokens = random_tokens(config)
    changed = tokens.clone()
    changed[:, CHANGED_POSITION] += 1
    with torch.no_grad():
        return model.hidden(tokens), model.hidden(changed)


def test_the_whole_model_is_causal_to_the_last_bit(ranks: Ranks) -> None:
    before, after = ranks(1).run(model_before_and_after, tiny_config())[0]
    assert torch.equal(before[:CHANGED_POSITION], after[:CHANGED_POSITION])
    assert not torch.equal(before[CHANGED_POSITION], after[CHANGED_POSITION])


def decode(config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, S, V] with tokens as the layout has them, replicated, and of an odd prefix."""
    groups = start(config)
    model = build_model(config, groups)
    tokens = random_tokens(config)
    with torch.no_grad():
        sharded = model(tokens)
    with model.replicated_tokens():
        replicated, prefix = model(tokens), model(tokens[:, :5])
    with torch.no_grad():
        assert torch.equal(model(tokens), sharded), "the layout's own form must be back"
    return sharded, replicated, prefix


def test_decoding_replicates_tokens_and_gives_the_same_logits(ranks: Ranks) -> None:
    config = tiny_config(**parallel(2, sequence_parallel=True))
    first, second = ranks(2).run(decode, config)
    for sharded, replicated, prefix in (first, second):
        torch.testing.assert_close(replicated, sharded, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prefix, sharded[:, :5], rtol=1e-5, atol=1e-5)
    # Ranks draw tokens from these: they must agree to the bit.
    assert torch.equal(first[1], second[1])


def observed(config: RunConfig) -> list[float]:
    """How much rules have observed after passes in evaluation, without gradients, in training."""
    groups = start(config)
    model = build_model(config, groups)
    rules = [rule for block in model.routed_blocks().values() for rule in block.router.running]
    assert len(rules) == 4
    totals = []
    for training, gradients in ((False, True), (True, False), (True, True)):
        with torch.set_grad_enabled(gradients):
            model.train(training)(random_tokens(config))
        totals.append(float(sum(rule.observed.abs().sum() for rule in rules)))
    return totals


def test_rules_learn_from_training_passes_alone_and_from_each_once(ranks: Ranks) -> None:
    # A layer that is recomputed passes without gradients first.
    config = tiny_config(feed_forward={"selection": "threshold"}, attention={"balance": ["bias"]})
    evaluated, first_pass, trained = ranks(1).run(observed, config)[0]
    assert evaluated == first_pass == 0
    assert trained > 0


class _Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_pass(config: RunConfig) -> int:
    """Of a feed-forward block, forward and backward, with one call for all products."""
    groups = start(config)
    model = build_model(config, groups, backend=GroupedBackend())
    block = model.routed_blocks()["layers.1.feed_forward"]
    length, width = config.model.sequence_length, config.model.hidden_size
    x = own_shard(torch.randn(length, 4, width), groups).requires_grad_()
    context = model.context((4, length), None, x.device)
    block(x, context).sum().backward()  # what is made once for all passes
    with _Operations() as operations:
        block(x, context).sum().backward()
    return operations.count


def test_work_of_the_host_does_not_grow_with_the_experts(ranks: Ranks) -> None:
    for tensor in (1, 2):
        counts = [
            ranks(tensor).run(
                operations_of_a_pass,
                tiny_config(
                    feed_forward={"num_experts": experts, "top_k": 2},
                    model={"ffn_size": 512},
                    **parallel(tensor, sequence_parallel=tensor > 1),
                ),
            )
            for experts in (8, 32)
        ]
        assert counts[0] == counts[1]
