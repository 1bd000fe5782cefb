"""Which layers a pipeline stage computes."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import accumulate
from math import inf

from uoe_parallel.config.schema import AttentionConfig, FeedForwardConfig, RunConfig


def stage_layers(config: RunConfig, num_stages: int, vocab_size: int) -> list[range]:
    """The transformer layers of each stage: runs, none empty, the dearest as cheap as can be, and
    of the cuts that reach this the most even one.

    The head counts to the last layer; the embedding, which multiplies nothing, counts to none.
    """
    costs = [layer_cost(config, layer) for layer in range(config.model.num_layers)]
    costs[-1] += config.model.hidden_size * vocab_size
    return list(_cut(tuple(costs), num_stages))


@lru_cache  # a planner asks for the same cut again and again
def _cut(costs: tuple[int, ...], num_stages: int) -> tuple[range, ...]:
    num_layers = len(costs)
    assert 1 <= num_stages <= num_layers
    before = list(accumulate(costs, initial=0))

    def ends_of(first: int, stages: int) -> range:
        """Where the first of `stages` stages from layer `first` on may end."""
        soonest = first + 1 if stages > 1 else num_layers
        return range(soonest, num_layers - stages + 2)

    def cost(first: int, end: int) -> int:
        return before[end] - before[first]

    @cache
    def dearest(first: int, stages: int) -> int:
        """The smallest possible cost of the dearest stage."""
        if stages == 0:
            return 0
        ends = ends_of(first, stages)
        return min(max(cost(first, end), dearest(end, stages - 1)) for end in ends)

    limit = dearest(0, num_stages)

    @cache
    def evenest(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The smallest sum of squared costs with no stage beyond the limit, and the ends."""
        if stages == 0:
            return 0, ()
        options = []
        for end in ends_of(first, stages):
            rest, ends = evenest(end, stages - 1)
            own = cost(first, end)
            options.append((own**2 + rest if own <= limit else inf, (end, *ends)))
        return min(options)

    _, ends = evenest(0, num_stages)
    return tuple(range(first, end) for first, end in zip((0, *ends), ends, strict=False))


def layer_cost(config: RunConfig, layer: int) -> int:
    """Multiply-adds of a token's forward pass through a layer, as UoE's cost table counts them.

    The share of tokens that an expert takes is taken as its even share, top_k / experts.
    """
    model = config.model
    hidden, length = model.hidden_size, model.sequence_length
    matrices = 3 if model.activation == "swiglu" else 2
    queries = active_share(config.attention, layer, model.kv_heads)
    keys = queries if config.attention.keys_and_values == "selected" else 1.0
    feed_forward = active_share(config.feed_forward, layer, config.feed_forward.num_experts)
    seen = 1 if model.causal else 2  # half of the keys are masked in a causal model
    return round(
        2 * hidden * hidden * (queries + keys * model.kv_heads / model.num_heads)
        + seen * length * hidden * queries * keys  # scores and weighted values
        + matrices * hidden * model.ffn_size * feed_forward
    )


def active_share(
    routing: AttentionConfig | FeedForwardConfig, layer: int, num_experts: int
) -> float:
    """Of a block's experts, those that a token visits: all in a dense block, and otherwise on
    average, without drops."""
    if not routing.routes(layer):
        return 1.0
    return (routing.chosen_experts + routing.shared_experts) / num_experts
