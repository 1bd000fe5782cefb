"""A Union of Experts (arXiv 2503.02495) for transformers: causal language models.

An expert is a slice of a dense block: a part of the feed-forward block's width, or a key/value head
with its query heads. Routers choose which slices a token visits; gates weight what they return.
What balances experts in training is not part of this.

Shape suffixes: B texts, S new tokens of each, T tokens so far (S and those in the cache), D hidden
width, N experts of a block, E those of them that are routed, K key/value heads, H query heads, d
head width, R rows (new tokens of all texts), M rows of one expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_uoe import UoEConfig


@dataclass(frozen=True)
class Places:
    """Where the tokens of a batch are, cached ones included."""

    position_BT: Tensor
    """int64: a token's place in its text, from 0."""
    real_BT: Tensor
    """bool, False for padding, which may lie before or behind a text."""

    @classmethod
    def of(cls, attention_mask_BT: Tensor) -> Places:
        real_BT = attention_mask_BT.bool()
        return cls((real_BT.long().cumsum(1) - 1).clamp(min=0), real_BT)

    def visible(self, new: int, keys_BKT: Tensor) -> Tensor:
        """Which of the keys the last `new` tokens see, bool [B, K, S, T]. Every token sees itself,
        also if it is no key: the softmax of nothing is not a number."""
        place_T = torch.arange(keys_BKT.shape[-1], device=keys_BKT.device)
        place_S1 = place_T[-new:, None]
        return (keys_BKT.unsqueeze(2) & (place_T <= place_S1)) | (place_T == place_S1)


class Router(nn.Module):
    """One choice of experts, made for units of neighbouring tokens.

    A patch is judged by its first token, a segment by the mean of the segment before it; the first
    segment keeps all experts.
    """

    bias: Tensor
    threshold: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        gate: str,
        cache_layer: int,
        *,
        unit: str,
        unit_length: int,
        top_k: int | None,
        has_bias: bool,
        capacity: int | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        if has_bias:
            self.register_buffer("bias", torch.zeros(num_experts))
        if top_k is None:
            self.register_buffer("threshold", torch.zeros(num_experts))
        self.gate = GATES[gate]
        self.cache_layer = cache_layer
        self.is_segment = unit == "segment"
        self.unit_length = unit_length
        self.top_k = top_k
        self.has_bias = has_bias
        self.capacity = capacity

    def forward(
        self, x_BSD: Tensor, places: Places, cache: DynamicCache | None, allowed_BTE: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The chosen experts of the tokens so far, bool [B, T, E], and gates, of at least fp32."""
        precise = torch.promote_types(x_BSD.dtype, torch.float32)
        scores_BTE = F.linear(x_BSD.to(precise), self.weight.to(precise))
        if cache is not None:
            # All choices follow from the scores of the tokens so far, which are few numbers.
            kept_B1TE = scores_BTE.unsqueeze(1)
            kept_B1TE, _ = cache.update(kept_B1TE, kept_B1TE[..., :0], self.cache_layer)
            scores_BTE = kept_B1TE.squeeze(1)
        scores_BTE, known_BT = self._of_units(scores_BTE, places)
        choosing_BTE = scores_BTE + self.bias.to(precise) if self.has_bias else scores_BTE
        if allowed_BTE is not None:
            choosing_BTE = choosing_BTE.masked_fill(~allowed_BTE, -math.inf)
        chosen_BTE = self._choose(choosing_BTE) | ~known_BT.unsqueeze(-1)
        chosen_BTE = chosen_BTE & (choosing_BTE > -math.inf) & places.real_BT.unsqueeze(-1)
        if self.capacity is not None:
            is_first_BT = places.position_BT % self.unit_length == 0
            taken_BTE = (chosen_BTE & is_first_BT.unsqueeze(-1)).cumsum(1)
            chosen_BTE = chosen_BTE & (taken_BTE <= self.capacity)
        return chosen_BTE, self.gate(scores_BTE, chosen_BTE)

    def _of_units(self, scores_BTE: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """The scores of each token's unit, and bool [B, T], whether there is anything to judge
        by."""
        position_BT, length = places.position_BT, self.unit_length
        place_T = torch.arange(position_BT.shape[1], device=position_BT.device)
        first_BT = place_T - position_BT % length
        if not self.is_segment:
            return _pick(scores_BTE, first_BT), torch.ones_like(places.real_BT)
        index_BTE = first_BT.unsqueeze(-1).expand_as(scores_BTE)
        sums_BTE = torch.zeros_like(scores_BTE).scatter_add(1, index_BTE, scores_BTE)
        known_BT = position_BT >= length
        previous_BT = torch.where(known_BT, first_BT - length, 0)
        return _pick(sums_BTE, previous_BT) / length * known_BT.unsqueeze(-1), known_BT

    def _choose(self, scores_BTE: Tensor) -> Tensor:
        if self.top_k is None:
            return scores_BTE > self.threshold
        # Ties go to the lowest index, which torch.topk does not promise.
        least_BT1 = scores_BTE.topk(self.top_k, dim=-1).values[..., -1:]
        above_BTE, equal_BTE = scores_BTE > least_BT1, scores_BTE == least_BT1
        room_BT1 = self.top_k - above_BTE.sum(-1, keepdim=True)
        return above_BTE | (equal_BTE & (equal_BTE.cumsum(-1) <= room_BT1))


def _pick(x_BTE: Tensor, place_BT: Tensor) -> Tensor:
    """For each token what another place has."""
    return x_BTE.gather(1, place_BT.unsqueeze(-1).expand_as(x_BTE))


def _sigmoid(scores_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
    return 2 * scores_BTE.sigmoid()


def _relu(scores_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
    return (1 + scores_BTE).relu()


def _softmax(scores_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
    """E softmax(s)."""
    exp_BTE = (scores_BTE - scores_BTE.amax(-1, keepdim=True)).exp()
    return exp_BTE / exp_BTE.mean(-1, keepdim=True)


def _softmax_of_chosen(scores_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
    """c softmax(s) over the c chosen experts; anything where there are none."""
    chosen_BTE = chosen_BTE | ~chosen_BTE.any(-1, keepdim=True)
    scores_BTE = scores_BTE.masked_fill(~chosen_BTE, -math.inf)
    exp_BTE = (scores_BTE - scores_BTE.amax(-1, keepdim=True)).exp()
    return exp_BTE * chosen_BTE.sum(-1, keepdim=True) / exp_BTE.sum(-1, keepdim=True)


GATES = {
    "sigmoid": _sigmoid,
    "relu": _relu,
    "softmax": _softmax,
    "softmax_of_chosen": _softmax_of_chosen,
}


class Block(nn.Module):
    """One half of a layer: experts, behind routers where the layer routes."""

    def __init__(
        self, config: UoEConfig, rules: dict[str, Any], layer: int, cache_layer: int
    ) -> None:
        super().__init__()
        self.num_experts = rules["num_experts"]
        self.is_routed = layer in rules["routed_layers"]
        if not self.is_routed:
            return
        self.routed = [n for n in range(self.num_experts) if n not in rules["shared_experts"]]
        self.routers = nn.ModuleList(
            Router(
                config.hidden_size, len(self.routed), rules["gate"], cache_layer + number, **choice
            )
            for number, choice in enumerate(rules["routers"])
        )

    def route(
        self, x_BSD: Tensor, places: Places, cache: DynamicCache | None
    ) -> tuple[Tensor, Tensor]:
        """The experts that the tokens so far visit, bool [B, T, N], and their gates."""
        chosen_BTE, gates_BTE = self.routers[0](x_BSD, places, cache, None)
        for router in self.routers[1:]:
            chosen_BTE, more_BTE = router(x_BSD, places, cache, chosen_BTE)
            gates_BTE = gates_BTE * more_BTE
        # Shared experts take every token, with a gate of one.
        mask_BTN = places.real_BT.unsqueeze(-1).repeat(1, 1, self.num_experts)
        mask_BTN[..., self.routed] = chosen_BTE
        gates_BTN = gates_BTE.new_ones(mask_BTN.shape)
        gates_BTN[..., self.routed] = gates_BTE
        return mask_BTN, gates_BTN


class Attention(Block):
    """Heads whose rows in `qkv` lie by key/value head: its queries, its key, its value."""

    def __init__(self, config: UoEConfig, layer: int, cache_layer: int) -> None:
        super().__init__(config, config.attention, layer, cache_layer)
        self.head_width = config.hidden_size // config.num_attention_heads
        self.queries = config.num_attention_heads // config.num_key_value_heads
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * self.head_width
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.rope_base = config.rope_base if config.positions == "rotary" else None
        self.selects_keys = self.is_routed and config.attention["keys_and_values"] == "selected"
        self.layer = layer

    def forward(self, x_BSD: Tensor, places: Places, cache: DynamicCache | None) -> Tensor:
        new = x_BSD.shape[1]
        heads = self.qkv(x_BSD).unflatten(-1, (self.num_experts, -1, self.head_width))
        q, k, v = heads.split((self.queries, 1, 1), dim=3)  # [B, S, K, heads of one expert, d]
        if self.rope_base is not None:
            position_BS = places.position_BT[:, -new:]
            q, k = (_rotate(x, position_BS, self.rope_base) for x in (q, k))
        q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mask_BTN, gates_BTN = self.route(x_BSD, places, cache) if self.is_routed else (None, None)
        keys_BKT = places.real_BT.unsqueeze(1)
        if mask_BTN is not None and self.selects_keys:
            keys_BKT = mask_BTN.transpose(1, 2).repeat_interleave(self.queries, dim=1)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=places.visible(new, keys_BKT), enable_gqa=True
        )
        y = y.transpose(1, 2).unflatten(2, (self.num_experts, -1)).flatten(3)  # [B, S, K, ...]
        if mask_BTN is not None and gates_BTN is not None:
            y = y * gates_BTN[:, -new:, :, None].to(y.dtype)
            y = y.masked_fill(~mask_BTN[:, -new:, :, None], 0)
        return self.output(y.flatten(2))


def _rotate(x: Tensor, position_BS: Tensor, base: float) -> Tensor:
    """Rotary positions for [B, S, ..., d]: pairs (i, i + d/2) turned by position * base^(-2i/d)."""
    precise = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=precise) / half
    angle = position_BS.to(precise).view(*position_BS.shape, 1, 1, 1) * base**-exponent
    a, b = x.to(precise).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class FeedForward(Block):
    """Expert after expert has its rows in `fc1`, with swiglu those of its gate and then the others,
    and its columns in `fc2`."""

    def __init__(self, config: UoEConfig, layer: int, cache_layer: int) -> None:
        super().__init__(config, config.feed_forward, layer, cache_layer)
        self.activation = config.activation
        factor = 2 if config.activation == "swiglu" else 1
        width = config.intermediate_size
        self.fc1 = nn.Linear(config.hidden_size, factor * width, bias=config.bias)
        self.fc2 = nn.Linear(width, config.hidden_size, bias=config.bias)

    def forward(self, x_BSD: Tensor, places: Places, cache: DynamicCache | None) -> Tensor:
        if not self.is_routed:
            by_expert = self.fc1(x_BSD).unflatten(-1, (self.num_experts, -1))
            return self.fc2(self._activate(by_expert).flatten(-2))
        mask_BTN, gates_BTN = self.route(x_BSD, places, cache)
        new, rows_RD = x_BSD.shape[1], x_BSD.flatten(0, 1)
        mask_RN, gates_RN = (x[:, -new:].flatten(0, 1) for x in (mask_BTN, gates_BTN))
        y_RD = torch.zeros_like(rows_RD)
        weight1 = self.fc1.weight.unflatten(0, (self.num_experts, -1))
        weight2 = self.fc2.weight.unflatten(1, (self.num_experts, -1))
        biases = [None] * self.num_experts
        if self.fc1.bias is not None:
            biases = self.fc1.bias.unflatten(0, (self.num_experts, -1))
            y_RD = y_RD + self.fc2.bias
        for expert in range(self.num_experts):
            (row_M,) = mask_RN[:, expert].nonzero(as_tuple=True)
            hidden = F.linear(rows_RD[row_M], weight1[expert], biases[expert])
            gated = self._activate(hidden) * gates_RN[row_M, expert, None]
            result_MD = F.linear(gated.to(hidden.dtype), weight2[:, expert])
            y_RD = y_RD.index_add(0, row_M, result_MD)
        return y_RD.view_as(x_BSD)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: UoEConfig, layer: int) -> None:
        super().__init__()
        # In the cache, routers' scores lie behind the keys and values of all layers.
        first = config.num_hidden_layers + 4 * layer
        self.attention_norm = _norm(config)
        self.attention = Attention(config, layer, first)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = FeedForward(config, layer, first + 2)

    def forward(self, x_BSD: Tensor, places: Places, cache: DynamicCache | None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), places, cache)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD), places, cache)


def _norm(config: UoEConfig) -> nn.Module:
    norm = {"rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm}[config.norm]
    return norm(config.hidden_size, eps=config.norm_eps)


class UoEForCausalLM(PreTrainedModel, GenerationMixin):
    """Token ids to logits of the next tokens.

    A text is one document; padding, before or behind it, is where `attention_mask` is 0. Positions
    follow from the mask.
    """

    config_class = UoEConfig
    _tied_weights_keys = {"lm_head.weight": "token_embedding.weight"}  # noqa: RUF012
    # Routes follow from scores of single precision, whatever the model's.
    _keep_in_fp32_modules_strict = ["routers"]  # noqa: RUF012

    def __init__(self, config: UoEConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = None
        if config.positions == "learned":
            length = config.max_position_embeddings
            self.position_embedding = nn.Embedding(length, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.final_norm = _norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `forward` makes the cache, one with more layers than the model has.
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids: int64 [B, S]. attention_mask: [B, T], of all tokens so far; None without
        padding. past_key_values: what a call with `use_cache` returned. labels: [B, S], as
        input_ids, -100 where nothing is to be predicted; gives the mean cross entropy of next
        tokens. logits_to_keep: of so many last tokens, 0 for all. Further arguments of
        transformers, such as position_ids, change nothing.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache and not self.training:
            past_key_values = DynamicCache()
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), seen + input_ids.shape[1])
        places = Places.of(attention_mask)
        x_BSD = self.token_embedding(input_ids)
        if self.position_embedding is not None:
            position_BS = places.position_BT[:, -input_ids.shape[1] :]
            x_BSD = x_BSD + self.position_embedding(position_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, places, past_key_values)
        logits = self.lm_head(self.final_norm(x_BSD[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
