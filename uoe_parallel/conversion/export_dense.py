"""A checkpoint with all experts on, as the dense model of transformers that it is a slicing of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uoe_parallel.config.schema import ModelConfig, Precision, RunConfig
from uoe_parallel.conversion.export_folder import Exported, ExportedTensor, write_model
from uoe_parallel.conversion.export_source import Source
from uoe_parallel.errors import UserError


def merge(run: Path, out: Path, precision: Precision | None = None) -> Exported:
    """Write the checkpoint at `run` to the new folder `out`, as a model of the type llama or gpt2.

    run: as in `checkpoint.locate_checkpoint`. precision: of the weights; None for the run's.
    Routers, and what their rules came to, are left out. Raises UserError, also if the model is
    neither.
    """
    source = Source(run, precision)
    config, model = source.config, source.config.model
    if not (unlike_llama := _differences(model, _LLAMA)):
        fields, weights = _llama_config(config), _llama_weights(config)
    elif not (unlike_gpt2 := _differences(model, _GPT2)):
        fields, weights = _gpt2_config(config), _gpt2_weights(config)
    else:
        raise UserError(
            f"{source.reader.path}: neither Llama nor GPT-2 computes what this model does. Llama "
            f"has {unlike_llama}; GPT-2 has {unlike_gpt2}. Use the subcommand export, which brings "
            "every causal model to transformers"
        )
    fields["vocab_size"] = source.vocab_size
    return write_model(out, source, fields, [_exported(source, weight) for weight in weights])


class _Weight(NamedTuple):
    """One of the dense model."""

    name: str
    parameter: str
    """Ours that holds it."""
    change: Callable[[Tensor], Tensor] = lambda value: value
    """Of our values to the dense model's."""


def _exported(source: Source, weight: _Weight) -> ExportedTensor:
    # On "meta" a tensor has a shape and nothing else.
    like = weight.change(torch.empty(source.shape(weight.parameter), device="meta"))
    return ExportedTensor(
        weight.name,
        tuple(like.shape),
        source.dtype,
        lambda: weight.change(source.read(weight.parameter)),
    )


_LLAMA = {"norm": ("rms_norm",), "positions": ("rotary",), "activation": ("swiglu",)}
_GPT2 = {
    "norm": ("layer_norm",),
    "positions": ("learned",),
    "activation": ("gelu_tanh", "gelu"),
    "bias": (True,),
}


def _differences(model: ModelConfig, needed: dict[str, tuple[Any, ...]]) -> str:
    """What a dense model has and ours has not, in words; empty if there is nothing."""
    other = {
        field: values for field, values in needed.items() if getattr(model, field) not in values
    }
    words = [f"model.{field} = {values[0]}" for field, values in other.items()]
    if needed is _GPT2 and model.kv_heads != model.num_heads:
        words.append("as many key/value heads as heads")
    return ", ".join(words)


def _llama_config(config: RunConfig) -> dict[str, Any]:
    model = config.model
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _llama_weights(config: RunConfig) -> Iterator[_Weight]:
    model = config.model
    yield _Weight("model.embed_tokens.weight", "embedding.tokens.weight")
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, feed_forward = f"{ours}.attention.experts", f"{ours}.feed_forward.experts"
        yield _Weight(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        norm = f"{theirs}.post_attention_layernorm.weight"
        yield _Weight(norm, f"{ours}.feed_forward_norm.weight")
        for kind in ("weight", "bias") if model.bias else ("weight",):
            for number, name in enumerate("qkv"):
                change = partial(_of_heads, model=model, parts=(number,))
                projection = f"{theirs}.self_attn.{name}_proj.{kind}"
                yield _Weight(projection, f"{attention}.qkv.{kind}", change)
            yield _Weight(f"{theirs}.self_attn.o_proj.{kind}", f"{attention}.output.{kind}")
            for number, name in enumerate(("gate", "up")):
                change = partial(_of_slices, experts=config.feed_forward.num_experts, part=number)
                projection = f"{theirs}.mlp.{name}_proj.{kind}"
                yield _Weight(projection, f"{feed_forward}.fc1.{kind}", change)
            yield _Weight(f"{theirs}.mlp.down_proj.{kind}", f"{feed_forward}.fc2.{kind}")
    yield _Weight("model.norm.weight", "final_norm.weight")
    if not model.tie_embeddings:
        yield _Weight("lm_head.weight", "head.logits.weight")


def _gpt2_config(config: RunConfig) -> dict[str, Any]:
    model = config.model
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": model.sequence_length,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _gpt2_weights(config: RunConfig) -> Iterator[_Weight]:
    model = config.model
    heads = partial(_of_heads, model=model, parts=(0, 1, 2))
    yield _Weight("transformer.wte.weight", "embedding.tokens.weight")
    yield _Weight("transformer.wpe.weight", "embedding.positions")
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        attention, feed_forward = f"{ours}.attention.experts", f"{ours}.feed_forward.experts"
        for kind in ("weight", "bias"):
            yield _Weight(f"{theirs}.ln_1.{kind}", f"{ours}.attention_norm.{kind}")
            yield _Weight(f"{theirs}.ln_2.{kind}", f"{ours}.feed_forward_norm.{kind}")
            for name, parameter, change in (
                ("attn.c_attn", f"{attention}.qkv", lambda value: _turned(heads(value))),
                ("attn.c_proj", f"{attention}.output", _turned),
                ("mlp.c_fc", f"{feed_forward}.fc1", _turned),
                ("mlp.c_proj", f"{feed_forward}.fc2", _turned),
            ):
                yield _Weight(f"{theirs}.{name}.{kind}", f"{parameter}.{kind}", change)
    for kind in ("weight", "bias"):
        yield _Weight(f"transformer.ln_f.{kind}", f"final_norm.{kind}")
    if not model.tie_embeddings:
        yield _Weight("lm_head.weight", "head.logits.weight")


def _of_heads(value: Tensor, model: ModelConfig, parts: tuple[int, ...]) -> Tensor:
    """Rows of queries (0), keys (1), values (2), or of several after each other, in the order of
    heads, out of rows by key/value head."""
    queries = model.num_heads // model.kv_heads
    rows = value.unflatten(0, (model.kv_heads, queries + 2, -1))
    kinds = rows.split((queries, 1, 1), dim=1)
    return torch.cat([kinds[part].flatten(0, 2) for part in parts])


def _of_slices(value: Tensor, experts: int, part: int) -> Tensor:
    """Rows of gates (0) or of what they gate (1), out of rows by expert."""
    return value.unflatten(0, (experts, 2, -1))[:, part].flatten(0, 1)


def _turned(value: Tensor) -> Tensor:
    """GPT-2's layers hold their matrices the other way round."""
    return value.T if value.dim() == 2 else value
