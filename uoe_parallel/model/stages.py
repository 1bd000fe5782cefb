"""Which layers a pipeline stage computes."""

from __future__ import annotations

from functools import cache

from uoe_parallel.config.schema import AttentionConfig, FeedForwardConfig, RunConfig


def stage_layers(config: RunConfig, num_stages: int, vocab_size: int) -> list[range]:
    """The transformer layers of each stage: runs, none empty, the dearest as cheap as can be.

    The head counts to the last layer; the embedding, which multiplies nothing, counts to none.
    """
    costs = [layer_cost(config, layer) for layer in range(config.model.num_layers)]
    costs[-1] += config.model.hidden_size * vocab_size
    assert 1 <= num_stages <= len(costs)

    @cache
    def best(first: int, stages: int) -> tuple[int, tuple[int, ...]]:
        """The dearest stage's cost and the ends of the stages for the layers from `first` on."""
        if stages == 1:
            return sum(costs[first:]), (len(costs),)
        options = []
        for end in range(first + 1, len(costs) - stages + 2):
            rest, ends = best(end, stages - 1)
            options.append((max(sum(costs[first:end]), rest), (end, *ends)))
        return min(options, key=lambda option: option[0])

    _, ends = best(0, num_stages)
    return [range(first, end) for first, end in zip((0, *ends), ends, strict=False)]


def layer_cost(config: RunConfig, layer: int) -> int:
    """Multiply-adds of a token's forward pass through a layer, as UoE's cost table counts them.

    The share of tokens that an expert takes is taken as its even share, top_k / experts.
    """
    model = config.model
    hidden, length = model.hidden_size, model.sequence_length
    matrices = 3 if model.activation == "swiglu" else 2
    heads = model.num_heads + 2 * model.kv_heads
    projections = hidden * hidden * (heads + model.num_heads) / model.num_heads
    attention = _active(config.attention, layer, model.kv_heads)
    feed_forward = _active(config.feed_forward, layer, config.feed_forward.num_experts)
    return round(
        projections * attention
        + length * hidden * attention**2  # scores and weighted values, half of them masked
        + matrices * hidden * model.ffn_size * feed_forward
    )


def _active(routing: AttentionConfig | FeedForwardConfig, layer: int, num_experts: int) -> float:
    return routing.top_k / num_experts if routing.routes(layer) else 1.0
