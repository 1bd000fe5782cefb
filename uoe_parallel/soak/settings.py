"""The run that is hurt: a small one, unless the user has another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import uoe_parallel
from uoe_parallel.config import yaml_text
from uoe_parallel.config.load import load_config
from uoe_parallel.data.corpus import build_stdlib_corpus
from uoe_parallel.soak.schedule import Reference

STEPS, EVERY, KEPT = 40, 4, 3
"""Steps of a run, from one checkpoint to the next, and how many of them stay."""
WAIT_LIMIT = 10.0
"""Seconds, above what ranks wait for each other on a machine that also starts other ones."""
RESHARDED_TOLERANCE = 1e-3
"""Of losses, relative, over a whole run: a sum in another order may turn a token's close choice of
an expert, and a run then goes a way of its own, if a near one."""

_SMALL: dict[str, Any] = {
    "seed": 7,
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_size": 64,
        "num_heads": 8,
        "num_kv_heads": 4,
        "sequence_length": 16,
    },
    "feed_forward": {"num_experts": 8, "top_k": 3},
    "attention": {"routed_layers": "all", "top_k": 2},
    "training": {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "expert_products": "loop",
        "validation_sequences": 16,
    },
}


def write_config(folder: Path, own: Path | None) -> Path:
    """The config of all runs of a soak, in `folder`: `own`, or a small model on the source of this
    package, as a run of STEPS steps with all that keeps it alive. Raises UserError."""
    if own is None:
        corpus = folder / "corpus"
        build_stdlib_corpus(corpus, Path(uoe_parallel.__file__).parent)
        splits = ("train", "validation", "test")
        tree = _SMALL | {"data": {split: str(corpus / split) for split in splits}}
        tree["run_dir"] = "unused"
    else:
        tree = load_config(own).model_dump(mode="json")
    changes: dict[str, dict[str, Any]] = {
        "training": {"steps": STEPS, "validate_every": STEPS // 2},
        "checkpoint": {"every": EVERY, "keep": KEPT},
        "replicas": {"check_every": 1, "on_mismatch": "repair"},
        "profile": {"wait_limit": WAIT_LIMIT},
        "logging": {"every": 1, "tensorboard": False},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    path = folder / "soak.yaml"
    path.write_text(yaml_text.dump(tree))
    load_config(path)
    return path


def overrides(reference: Reference, run_dir: Path, *, asynchronous: bool = False) -> list[str]:
    """What a single run has of its own."""
    return [
        f"run_dir={run_dir}",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
        f"anomalies.not_finite={'stop' if reference == 'plain' else reference}",
    ]
