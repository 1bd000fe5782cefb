"""Where the weights of a run begin that does not begin with random ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uoe_parallel.checkpoint import CheckpointReader, locate_checkpoint
from uoe_parallel.config.faults import ABSENT, show
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.tokenizer import Tokenizer
from uoe_parallel.errors import UserError
from uoe_parallel.inference.same_tokenizer import check_tokenizer
from uoe_parallel.parallel.agreement import broadcast_json, gather_json, shared_fate
from uoe_parallel.parallel.sharding import named_shards
from uoe_parallel.routing.router import ROUTER_SUFFIX
from uoe_parallel.training.engine import TrainingEngine
from uoe_parallel.training.state import adopt

_NOT_OF_WEIGHTS = {
    *("sequence_length", "num_kv_heads", "vocab_multiple"),
    *("dropout", "attention_dropout", "init_std", "router_init_std"),
}
"""Fields of the model that its weights mean the same without, or that their shapes tell."""


def start_from(path: Path, engine: TrainingEngine, tokenizer: Tokenizer) -> str:
    """Load the weights and routing rules of the checkpoint at `path` into a model that has not been
    trained; what there is to tell about it.

    path: as `locate_checkpoint` takes it. Routers and rules that it does not have stay as they are.
    Collective over all ranks. Raises UserError on every rank if there is no checkpoint, or one of
    another model or another tokenizer.
    """
    groups = engine.groups
    reader = locate_checkpoint(path, groups.world)
    with shared_fate(f"{reader.path} cannot be read", "See to the named file", groups.world):
        check_tokenizer(reader, engine.config.data.tokenizer, tokenizer)
        if faults := [*_other_fields(reader, engine.config), *_other_shapes(reader, engine)]:
            raise UserError(
                f"checkpoint.start_from: {reader.path} is of another model:\n  "
                + "\n  ".join(faults)
                + "\nGive this run the sizes of that model, or leave checkpoint.start_from out"
            )
    adopt(engine.deepspeed, engine.model, groups, reader)
    lacking = gather_json(_lacking(reader, engine), groups.world)
    count = len(broadcast_json(sorted({name for names in lacking for name in names}), groups.world))
    anew = f"; {count} routers that it does not have begin anew" if count else ""
    return f"starting from the weights of {reader.path}{anew}"


def _other_fields(reader: CheckpointReader, config: RunConfig) -> Iterator[str]:
    """Fields that the weights depend on and that have changed, with what they were and are."""
    saved: Any = reader.state["config"]
    old, new = (
        {f"model.{name}": value for name, value in tree["model"].items()}
        # Of a gated feed-forward block it orders the rows, also where that is dense.
        | {"feed_forward.num_experts": tree["feed_forward"]["num_experts"]}
        for tree in (saved, config.model_dump(mode="json"))
    )
    free = {f"model.{name}" for name in _NOT_OF_WEIGHTS}
    for field, value in new.items():
        if field not in free and old.get(field, ABSENT) != value:
            yield f"{field}: saved {show(old.get(field))}, now {show(value)}"


def _other_shapes(reader: CheckpointReader, engine: TrainingEngine) -> Iterator[str]:
    """This rank's parameters that the checkpoint has not, but for routers, or in another shape."""
    saved = reader.keys()
    for name, _, shard in named_shards(engine.model, engine.groups):
        key = f"{name}/weight"
        if key in saved:
            if reader.shape(key) != shard.global_shape:
                shapes = (show(list(shape)) for shape in (reader.shape(key), shard.global_shape))
                yield "{}: saved {}, now {}".format(name, *shapes)
        elif not name.endswith(ROUTER_SUFFIX):
            yield f"{name}: not saved"


def _lacking(reader: CheckpointReader, engine: TrainingEngine) -> list[str]:
    """This rank's routers that the checkpoint does not have."""
    saved = reader.keys()
    names = (name for name, _ in engine.model.named_parameters() if name.endswith(ROUTER_SUFFIX))
    return [name for name in names if f"{name}/weight" not in saved]
