"""A checkpoint with its routing, as a model that transformers loads with trust_remote_code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.config.rules import is_path
from uoe_parallel.config.schema import AttentionConfig, Precision, RunConfig
from uoe_parallel.conversion import exported
from uoe_parallel.conversion.export_folder import Exported, ExportedTensor, write_model
from uoe_parallel.conversion.export_source import Source
from uoe_parallel.errors import UserError
from uoe_parallel.inference.rules import restore_rules
from uoe_parallel.routing.level import Level
from uoe_parallel.routing.router import Router
from uoe_parallel.routing.selection.threshold import Threshold
from uoe_parallel.routing.selection.top_k import TopK

_RENAMED = {
    "embedding.tokens.weight": "token_embedding.weight",
    "embedding.positions": "position_embedding.weight",
    "head.logits.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class _Routing:
    """Of a block, which is named as in the model."""

    router: Router


def export(run: Path, out: Path, precision: Precision | None = None) -> Exported:
    """Write the checkpoint at `run` to the new folder `out`.

    run: as in `checkpoint.locate_checkpoint`. precision: of the weights; None for the run's. What
    the folder makes is the causal model with each text as one document. Raises UserError.
    """
    source = Source(run, precision)
    _refuse_foreign_rules(source)
    blocks = {name: _Routing(_router(source.config, name)) for name in source.config.routed_blocks}
    restore_rules(blocks, source.reader)
    tensors = [*_weights(source, blocks), *_rules(source, blocks)]
    folder = Path(exported.__file__).parent
    code = [folder / "configuration_uoe.py", folder / "modeling_uoe.py"]
    return write_model(out, source, _config(source, blocks), tensors, code)


def _refuse_foreign_rules(source: Source) -> None:
    for block in source.config.routed_blocks:
        routing = source.config.routing_of(block)
        for field, name in (("selection", routing.selection), ("gate", routing.gate)):
            if name is not None and is_path(name):
                kind = block.rpartition(".")[2]
                raise UserError(
                    f"{source.reader.path}: {kind}.{field} = {name} is a rule of another package, "
                    "which the exported code does not have; use one of this package's rules"
                )


def _router(config: RunConfig, block: str) -> Router:
    return Router(
        config.routing_of(block),
        num_experts=config.routed_blocks[block],
        context=config.model.sequence_length,
        causal=True,
    )


def _weights(source: Source, blocks: dict[str, _Routing]) -> Iterator[ExportedTensor]:
    """All parameters, whose rows and columns stay in their order."""
    routers = {
        f"{block}.{weight}": f"{block}.routers.{number}.weight"
        for block, routing in blocks.items()
        for number, weight in enumerate(routing.router.levels)
    }
    renamed = {**_RENAMED, **routers}
    for parameter in source.parameters:
        name = renamed.get(parameter, parameter.replace(".experts.", "."))
        read = partial(source.read, parameter)
        yield ExportedTensor(name, source.shape(parameter), source.dtype, read)


def _rules(source: Source, blocks: dict[str, _Routing]) -> Iterator[ExportedTensor]:
    """What rules that moved in training came to."""
    precise = torch.promote_types(source.dtype, torch.float32)
    for block, routing in blocks.items():
        for number, level in enumerate(routing.router.levels.values()):
            name = f"{block}.routers.{number}"
            offset_E = _offset(level)
            if offset_E is not None:
                yield _constant(f"{name}.bias", offset_E.to(precise))
            if isinstance(level.selection, Threshold):
                threshold_E = _rounded_down(level.selection.in_force_E, precise)
                yield _constant(f"{name}.threshold", threshold_E)


def _constant(name: str, value: Tensor) -> ExportedTensor:
    return ExportedTensor(name, tuple(value.shape), value.dtype, lambda: value)


def _offset(level: Level) -> Tensor | None:
    """What rules of balance add to the scores that experts are chosen by."""
    offsets = [offset_E for rule in level.balance if (offset_E := rule.offset()) is not None]
    return torch.stack(offsets).sum(0) if offsets else None


def _rounded_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """To `dtype`, in which as many numbers are then above it as were above `value`."""
    rounded = value.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.to(value.dtype) > value, below, rounded)


def _config(source: Source, blocks: dict[str, _Routing]) -> dict[str, Any]:
    model = source.config.model
    return {
        "model_type": "uoe",
        "architectures": ["UoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_uoe.UoEConfig",
            "AutoModelForCausalLM": "modeling_uoe.UoEForCausalLM",
        },
        "vocab_size": source.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.sequence_length,
        "activation": model.activation,
        "norm": model.norm,
        "norm_eps": model.norm_eps,
        "positions": model.positions,
        "rope_base": model.rope_base,
        "bias": model.bias,
        "tie_word_embeddings": model.tie_embeddings,
        "feed_forward": _routing(source.config, "feed_forward", blocks),
        "attention": _routing(source.config, "attention", blocks),
    }


def _routing(config: RunConfig, kind: str, blocks: dict[str, _Routing]) -> dict[str, Any]:
    """How blocks of a kind route, all of them alike."""
    fields = config.attention if kind == "attention" else config.feed_forward
    is_attention = isinstance(fields, AttentionConfig)
    experts = config.model.kv_heads if is_attention else config.feed_forward.num_experts
    layers = [n for n in range(config.model.num_layers) if fields.routes(n)]
    routing: dict[str, Any] = {"num_experts": experts, "routed_layers": layers}
    if not layers:
        return routing
    router = blocks[f"layers.{layers[0]}.{kind}"].router
    routing["shared_experts"] = sorted(router.shared)
    routing["gate"] = fields.gate
    routing["routers"] = [_choice(level) for level in router.levels.values()]
    if is_attention:
        routing["keys_and_values"] = fields.keys_and_values
    return routing


def _choice(level: Level) -> dict[str, Any]:
    assert isinstance(level.selection, TopK | Threshold)
    return {
        "unit": "patch" if level.summary == "first" else "segment",
        "unit_length": level.unit_length,
        "top_k": level.selection.k if isinstance(level.selection, TopK) else None,
        "has_bias": _offset(level) is not None,
        "capacity": None if level.capacity is None else level.capacity.limit,
    }
