"""A checkpoint with all experts on, as the dense model of transformers that it is a slicing of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.config.schema import ModelConfig, Precision
from uoe_parallel.conversion.export_folder import Exported, ExportedTensor, write_model
from uoe_parallel.conversion.export_source import Source
from uoe_parallel.errors import UserError


def merge(run: Path, out: Path, precision: Precision | None = None) -> Exported:
    """Write the checkpoint at `run` to the new folder `out`, as GPT-2 or Llama.

    run: as in `checkpoint.locate_checkpoint`. precision: of the weights; None for the run's. Routers
    and what their rules came to are left out. Raises UserError, also if the model is neither.
    """
    source = Source(run, precision)
    model = source.config.model
    if not _differences(model, _LLAMA):
        return write_model(out, source, _llama_config(source), list(_llama_weights(source)))
    if not _differences(model, _GPT2):
        return write_model(out, source, _gpt2_config(source), list(_gpt2_weights(source)))
    raise UserError(
        f"{source.reader.path}: neither Llama nor GPT-2 computes what this model does. Llama would "
        f"need {_differences(model, _LLAMA)}; GPT-2 would need {_differences(model, _GPT2)}. Use "
        "the subcommand export, which brings any model of this project to transformers"
    )


_LLAMA = {"norm": ("rms_norm",), "positions": ("rotary",), "activation": ("swiglu",)}
_GPT2 = {
    "norm": ("layer_norm",),
    "positions": ("learned",),
    "activation": ("gelu_tanh", "gelu"),
    "bias": (True,),
}


def _differences(model: ModelConfig, needed: dict[str, tuple[Any, ...]]) -> str:
    """In words, empty if there are none."""
    wrong = [
        f"model.{field} = {values[0]} and not {getattr(model, field)}"
        for field, values in needed.items()
        if getattr(model, field) not in values
    ]
    if needed is _GPT2 and model.kv_heads != model.num_heads:
        wrong.append(f"model.num_kv_heads = {model.num_heads} and not {model.kv_heads}")
    return ", ".join(wrong)


def _llama_config(source: Source) -> dict[str, Any]:
    model = source.config.model
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": source.vocab_size,
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


def _llama_weights(source: Source) -> Iterator[ExportedTensor]:
    model, whole = source.config.model, partial(_whole, source)
    yield whole("embedding.tokens.weight", "model.embed_tokens.weight")
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        yield whole(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight")
        norm = f"{theirs}.post_attention_layernorm.weight"
        yield whole(f"{ours}.feed_forward_norm.weight", norm)
        for kind in ("weight", "bias") if model.bias else ("weight",):
            attention, feed_forward = f"{ours}.attention.experts", f"{ours}.feed_forward.experts"
            for part, name in enumerate("qkv"):
                yield _tensor(
                    source,
                    f"{theirs}.self_attn.{name}_proj.{kind}",
                    f"{attention}.qkv.{kind}",
                    partial(_of_heads, model=model, parts=(part,)),
                )
            yield whole(f"{attention}.output.{kind}", f"{theirs}.self_attn.o_proj.{kind}")
            for part, name in enumerate(("gate", "up")):
                yield _tensor(
                    source,
                    f"{theirs}.mlp.{name}_proj.{kind}",
                    f"{feed_forward}.fc1.{kind}",
                    partial(_of_slices, slices=source.config.feed_forward.num_experts, part=part),
                )
            yield whole(f"{feed_forward}.fc2.{kind}", f"{theirs}.mlp.down_proj.{kind}")
    yield whole("final_norm.weight", "model.norm.weight")
    if not model.tie_embeddings:
        yield whole("head.logits.weight", "lm_head.weight")


def _gpt2_config(source: Source) -> dict[str, Any]:
    model = source.config.model
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": source.vocab_size,
        "n_positions": model.sequence_length,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _gpt2_weights(source: Source) -> Iterator[ExportedTensor]:
    model, whole = source.config.model, partial(_whole, source)
    yield whole("embedding.tokens.weight", "transformer.wte.weight")
    yield whole("embedding.positions", "transformer.wpe.weight")
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        attention, feed_forward = f"{ours}.attention.experts", f"{ours}.feed_forward.experts"
        for kind in ("weight", "bias"):
            yield whole(f"{ours}.attention_norm.{kind}", f"{theirs}.ln_1.{kind}")
            yield whole(f"{ours}.feed_forward_norm.{kind}", f"{theirs}.ln_2.{kind}")
            change = partial(_of_heads, model=model, parts=(0, 1, 2))
            for name, parameter, change in (
                ("attn.c_attn", f"{attention}.qkv", change),
                ("attn.c_proj", f"{attention}.output", None),
                ("mlp.c_fc", f"{feed_forward}.fc1", None),
                ("mlp.c_proj", f"{feed_forward}.fc2", None),
            ):
                yield _turned(source, f"{theirs}.{name}.{kind}", f"{parameter}.{kind}", change)
    for kind in ("weight", "bias"):
        yield whole(f"final_norm.{kind}", f"transformer.ln_f.{kind}")
    if not model.tie_embeddings:
        yield whole("head.logits.weight", "lm_head.weight")
