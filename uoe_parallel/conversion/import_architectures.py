"""What GPT-2 and Llama call their sizes and weights, and what these are here.

An architecture reads config.json and refuses what our model cannot compute, each fault with a
reason; it knows the name and shape of every tensor, and hands weights over layer by layer as the
dense weights that experts are cut from. Shape suffixes are those of `experts`, with V ids of the
vocabulary and L learned positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from uoe_parallel.conversion.import_source import CONFIG_NAME, DenseSource
from uoe_parallel.errors import UserError
from uoe_parallel.experts.attention import DenseAttentionWeights
from uoe_parallel.experts.mlp import DenseMLPWeights

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class NormWeights:
    weight_D: Tensor
    bias_D: Tensor | None = None
    """Of a LayerNorm."""


@dataclass(frozen=True)
class LayerWeights:
    attention_norm: NormWeights
    attention: DenseAttentionWeights
    feed_forward_norm: NormWeights
    feed_forward: DenseMLPWeights


@dataclass(frozen=True)
class EmbeddingWeights:
    tokens_VD: Tensor
    positions_LD: Tensor | None = None


@dataclass(frozen=True)
class EndWeights:
    norm: NormWeights
    head_VD: Tensor | None
    """None where it is the embedding's."""


class Architecture(Protocol):
    """Of one source, built as `kind(source)`. Raises UserError for a config that it cannot take."""

    @property
    def model(self) -> dict[str, Any]:
        """Fields of our section `model`."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def window(self) -> int | None:
        """Tokens that attention reaches back, None for all: longer contexts would differ."""
        ...

    def embedding(self) -> EmbeddingWeights: ...

    def layer(self, number: int) -> LayerWeights: ...

    def end(self) -> EndWeights: ...


class Gpt2:
    """GPT-2 (Radford et al., 2019): LayerNorm, learned positions, biases, tanh GELU."""

    window = None

    def __init__(self, source: DenseSource) -> None:
        fields = _Fields(source)
        self._source = source
        self.vocab_size = fields.size("vocab_size", 50257)
        self._hidden, self._layers = fields.size("n_embd", 768), fields.size("n_layer", 12)
        self._positions = fields.size("n_positions", 1024)
        self._ffn = fields.size("n_inner", 4 * self._hidden)
        self._tied = bool(fields.get("tie_word_embeddings", True))
        activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
        self.model: dict[str, Any] = {
            "num_layers": self._layers,
            "hidden_size": self._hidden,
            "ffn_size": self._ffn,
            "num_heads": fields.size("n_head", 12),
            "sequence_length": self._positions,
            "activation": fields.one_of("activation_function", activations, "gelu_new"),
            "norm": "layer_norm",
            "positions": "learned",
            "bias": True,
            "tie_embeddings": self._tied,
            "norm_eps": float(fields.get("layer_norm_epsilon", 1e-5)),
        }
        fields.must_be("scale_attn_weights", True)
        fields.must_be("scale_attn_by_inverse_layer_idx", False)
        fields.must_be("add_cross_attention", False)
        fields.finish()
        # The first ones were saved without their head, and so without its prefix.
        self._prefix = "transformer." if "transformer.wte.weight" in source.names else ""
        masks = ("attn.bias", "attn.masked_bias")
        source.check(
            dict(self._shapes()),
            lambda name: name.endswith(masks) or (self._tied and name == "lm_head.weight"),
        )

    def embedding(self) -> EmbeddingWeights:
        return EmbeddingWeights(self._read("wte.weight"), self._read("wpe.weight"))

    def layer(self, number: int) -> LayerWeights:
        at = f"h.{number}"
        q_AD, k_AD, v_AD = self._read(f"{at}.attn.c_attn.weight").t().chunk(3)
        q_bias_A, k_bias_A, v_bias_A = self._read(f"{at}.attn.c_attn.bias").chunk(3)
        return LayerWeights(
            attention_norm=self._norm(f"{at}.ln_1"),
            attention=DenseAttentionWeights(
                q_AD=q_AD,
                k_CD=k_AD,
                v_CD=v_AD,
                output_DA=self._read(f"{at}.attn.c_proj.weight").t(),
                q_bias_A=q_bias_A,
                k_bias_C=k_bias_A,
                v_bias_C=v_bias_A,
                output_bias_D=self._read(f"{at}.attn.c_proj.bias"),
            ),
            feed_forward_norm=self._norm(f"{at}.ln_2"),
            feed_forward=DenseMLPWeights(
                up_FD=self._read(f"{at}.mlp.c_fc.weight").t(),
                down_DF=self._read(f"{at}.mlp.c_proj.weight").t(),
                up_bias_F=self._read(f"{at}.mlp.c_fc.bias"),
                output_bias_D=self._read(f"{at}.mlp.c_proj.bias"),
            ),
        )

    def end(self) -> EndWeights:
        head_VD = None if self._tied else self._source.read("lm_head.weight")
        return EndWeights(self._norm("ln_f"), head_VD)

    def _norm(self, name: str) -> NormWeights:
        return NormWeights(self._read(f"{name}.weight"), self._read(f"{name}.bias"))

    def _read(self, name: str) -> Tensor:
        return self._source.read(self._prefix + name)

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        width, ffn = self._hidden, self._ffn
        if not self._tied:
            yield "lm_head.weight", (self.vocab_size, width)
        yield f"{self._prefix}wte.weight", (self.vocab_size, width)
        yield f"{self._prefix}wpe.weight", (self._positions, width)
        # GPT-2's linears have their weights by input.
        linears = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, ffn),
            "mlp.c_proj": (ffn, width),
        }
        norms = ["ln_f"]
        for number in range(self._layers):
            norms += [f"h.{number}.ln_1", f"h.{number}.ln_2"]
            for name, shape in linears.items():
                yield f"{self._prefix}h.{number}.{name}.weight", shape
                yield f"{self._prefix}h.{number}.{name}.bias", shape[1:]
        for norm in norms:
            yield f"{self._prefix}{norm}.weight", (width,)
            yield f"{self._prefix}{norm}.bias", (width,)


class Llama:
    """Llama (Touvron et al., arXiv 2302.13971) and Mistral: RMSNorm, rotary positions, SwiGLU,
    grouped-query attention."""

    def __init__(self, source: DenseSource) -> None:
        fields = _Fields(source)
        self._source = source
        self.vocab_size = fields.size("vocab_size", 32000)
        self._hidden = fields.size("hidden_size", 4096)
        self._layers = fields.size("num_hidden_layers", 32)
        self._ffn = fields.size("intermediate_size", 11008)
        heads = fields.size("num_attention_heads", 32)
        kv_heads = fields.size("num_key_value_heads", heads)
        self._tied = bool(fields.get("tie_word_embeddings", False))
        self._attention_bias = bool(fields.get("attention_bias", False))
        self._mlp_bias = bool(fields.get("mlp_bias", False))
        window = fields.get("sliding_window", None)
        self.window = None if window is None else int(window)
        self._head_width = self._hidden // heads
        self._kv_width = kv_heads * self._head_width
        self.model: dict[str, Any] = {
            "num_layers": self._layers,
            "hidden_size": self._hidden,
            "ffn_size": self._ffn,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "sequence_length": fields.size("max_position_embeddings", 2048),
            "activation": fields.one_of("hidden_act", {"silu": "swiglu"}, "silu"),
            "norm": "rms_norm",
            "positions": "rotary",
            "bias": self._attention_bias or self._mlp_bias,
            "tie_embeddings": self._tied,
            "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
            "rope_base": _rope_base(fields),
        }
        fields.must_be("partial_rotary_factor", 1, "turns a part of each head, and ours turns all")
        fields.must_be("head_dim", self._head_width, "is not hidden_size / num_attention_heads")
        fields.finish()
        source.check(
            dict(self._shapes()),
            lambda name: (
                name.endswith("rotary_emb.inv_freq") or (self._tied and name == "lm_head.weight")
            ),
        )

    def embedding(self) -> EmbeddingWeights:
        return EmbeddingWeights(self._source.read("model.embed_tokens.weight"))

    def layer(self, number: int) -> LayerWeights:
        at = f"model.layers.{number}"

        def read(name: str) -> Tensor:
            return self._source.read(f"{at}.{name}.weight")

        return LayerWeights(
            attention_norm=NormWeights(read("input_layernorm")),
            attention=DenseAttentionWeights(
                q_AD=read("self_attn.q_proj"),
                k_CD=read("self_attn.k_proj"),
                v_CD=read("self_attn.v_proj"),
                output_DA=read("self_attn.o_proj"),
                q_bias_A=self._bias(f"{at}.self_attn.q_proj", self._hidden),
                k_bias_C=self._bias(f"{at}.self_attn.k_proj", self._kv_width),
                v_bias_C=self._bias(f"{at}.self_attn.v_proj", self._kv_width),
                output_bias_D=self._bias(f"{at}.self_attn.o_proj", self._hidden),
            ),
            feed_forward_norm=NormWeights(read("post_attention_layernorm")),
            feed_forward=DenseMLPWeights(
                gate_FD=read("mlp.gate_proj"),
                up_FD=read("mlp.up_proj"),
                down_DF=read("mlp.down_proj"),
                gate_bias_F=self._bias(f"{at}.mlp.gate_proj", self._ffn),
                up_bias_F=self._bias(f"{at}.mlp.up_proj", self._ffn),
                output_bias_D=self._bias(f"{at}.mlp.down_proj", self._hidden),
            ),
        )

    def end(self) -> EndWeights:
        head_VD = None if self._tied else self._source.read("lm_head.weight")
        return EndWeights(NormWeights(self._source.read("model.norm.weight")), head_VD)

    def _bias(self, linear: str, width: int) -> Tensor | None:
        """Our model has biases everywhere or nowhere: where the source has none beside others, they
        are zeros."""
        if not self.model["bias"]:
            return None
        name = f"{linear}.bias"
        return self._source.read(name) if name in self._source.names else torch.zeros(width)

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        width, ffn, kv_width = self._hidden, self._ffn, self._kv_width
        yield "model.embed_tokens.weight", (self.vocab_size, width)
        yield "model.norm.weight", (width,)
        if not self._tied:
            yield "lm_head.weight", (self.vocab_size, width)
        linears = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv_width, width),
            "self_attn.v_proj": (kv_width, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
        }
        for number in range(self._layers):
            at = f"model.layers.{number}"
            yield f"{at}.input_layernorm.weight", (width,)
            yield f"{at}.post_attention_layernorm.weight", (width,)
            for name, shape in linears.items():
                yield f"{at}.{name}.weight", shape
                if self._mlp_bias if name.startswith("mlp") else self._attention_bias:
                    yield f"{at}.{name}.bias", shape[:1]


ARCHITECTURES: Mapping[str, Callable[[DenseSource], Architecture]] = {
    "gpt2": Gpt2,
    "llama": Llama,
    "mistral": Llama,
}
"""By config.json's model_type."""


def architecture_of(source: DenseSource) -> Architecture:
    """Raises UserError for one that is not known, or that our model cannot compute."""
    name = str(source.config.get("model_type"))
    if name not in ARCHITECTURES:
        raise UserError(
            f"{source.folder / CONFIG_NAME}: model_type {name} cannot be imported; it has to be "
            f"one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name](source)


class _Fields:
    """Reads config.json and collects what is wrong with it."""

    def __init__(self, source: DenseSource) -> None:
        self._path = source.folder / CONFIG_NAME
        self._tree = source.config
        self._faults: list[str] = []

    def get(self, name: str, default: Any) -> Any:
        """What is null is left out."""
        value = self._tree.get(name)
        return default if value is None else value

    def size(self, name: str, default: int) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fault(name, "is not a positive whole number")
            return 1
        return value

    def one_of(self, name: str, names: Mapping[str, str], default: str) -> str | None:
        """Our name for theirs."""
        value = self.get(name, default)
        if value not in names:
            self.fault(name, f"is not one of {', '.join(names)}")
        return names.get(value)

    def must_be(self, name: str, value: object, why: str = "") -> None:
        if self.get(name, value) != value:
            self.fault(name, why or f"has to be {value}, as our attention is computed")

    def fault(self, name: str, why: str) -> None:
        self._faults.append(f"{name} = {self._tree.get(name)!r} {why}")

    def finish(self) -> None:
        """Raise UserError with everything that is wrong."""
        if self._faults:
            text = "\n  ".join(self._faults)
            raise UserError(f"{self._path} describes a model that cannot be imported:\n  {text}")


def _rope_base(fields: _Fields) -> float:
    """transformers 5 says all of rotary positions in rope_parameters, those before it in rope_theta
    and rope_scaling."""
    base = fields.get("rope_theta", 10000.0)
    for name in ("rope_parameters", "rope_scaling"):
        given: dict[str, Any] = fields.get(name, {})
        base = given.get("rope_theta", base)
        if given.get("rope_type", given.get("type", "default")) != "default":
            fields.fault(name, "scales rotary positions, which our model does not")
        elif given.get("partial_rotary_factor", 1) != 1:
            fields.fault(name, "turns a part of each head, and ours turns all")
    return float(base)
