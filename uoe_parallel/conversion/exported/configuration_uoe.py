"""The configuration of a Union of Experts, for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class UoEConfig(PretrainedConfig):
    """A causal transformer whose blocks are unions of experts.

    `feed_forward` and `attention` say how the blocks of a kind route. Each has

    - num_experts: equal slices of the block; those of attention are its key/value heads.
    - routed_layers: layers, from 0, whose block is routed; the others compute all of it.
    - shared_experts: numbers of the experts that every token visits, with a gate of one.
    - gate: sigmoid, softmax, softmax_of_chosen or relu.
    - routers: one or two choices, the second among what the first leaves, each with its `unit`,
      patch or segment; `unit_length`, in tokens; `top_k`, the experts that a unit takes (null:
      those whose score is above a threshold); `has_bias`, whether biases are added to the scores
      that experts are chosen by; `capacity`, the most units of a text that an expert takes (null:
      any number).
    - keys_and_values, of attention: selected, if a head sees its own tokens only, or all.
    """

    model_type = "uoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 64,
        intermediate_size: int = 256,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        max_position_embeddings: int = 128,
        activation: str = "swiglu",
        norm: str = "rms_norm",
        norm_eps: float = 1e-5,
        positions: str = "rotary",
        rope_base: float = 10000.0,
        bias: bool = False,
        feed_forward: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.activation = activation
        self.norm = norm
        self.norm_eps = norm_eps
        self.positions = positions
        self.rope_base = rope_base
        self.bias = bias
        self.feed_forward = feed_forward or {"num_experts": 1, "routed_layers": []}
        self.attention = attention or {"num_experts": num_key_value_heads, "routed_layers": []}
        self.use_cache = use_cache
        super().__init__(**kwargs)
