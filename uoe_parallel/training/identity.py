"""What a run keeps when it resumes: its weights and the order of its data."""

from __future__ import annotations

from functools import reduce
from operator import getitem
from typing import Any

from uoe_parallel.checkpoint import CheckpointReader
from uoe_parallel.config.faults import show
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError

_FIXED = (
    "feed_forward.num_experts",
    "feed_forward.routed_layers",
    "feed_forward.shared_experts",
    "attention.routed_layers",
    "attention.shared_experts",
    "seed",
    "data.reset_at_documents",
    "data.mask_probability",
    "training.global_batch_size",
    "training.precision",
    "training.trains",
)
"""Fields of the config, next to those of the model."""
_NOT_OF_WEIGHTS = {"model": {"dropout", "attention_dropout"}}


def run_identity(config: RunConfig, data_fingerprint: Any) -> dict[str, Any]:
    """As JSON, by the names that a user knows. data_fingerprint: of the training data."""
    tree = config.model_dump(mode="json", exclude=_NOT_OF_WEIGHTS)
    model = {f"model.{name}": value for name, value in tree["model"].items()}
    fields = model | {field: reduce(getitem, field.split("."), tree) for field in _FIXED}
    kinds = {"feed_forward": config.feed_forward, "attention": config.attention}
    fields |= {f"levels of {kind}": routing.levels for kind, routing in kinds.items()}
    return fields | {"tokens of data.train and checksums": data_fingerprint}


def check_resumable(reader: CheckpointReader, identity: dict[str, Any]) -> None:
    """Raise UserError for a checkpoint of another model or another order of the data."""
    saved: Any = reader.state.get("identity", {})
    changed = [
        f"{field}: saved {show(saved.get(field))}, now {show(now)}"
        for field, now in identity.items()
        if saved.get(field) != now
    ]
    if changed:
        raise UserError(
            f"{reader.path} was saved by a run that differs:\n  "
            + "\n  ".join(changed)
            + "\nRestore these fields to continue it, or choose another run_dir"
        )
