"""A run small enough for tests: its config and its corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

from uoe_parallel.config.schema import RunConfig

VOCAB_SIZE = 264
USED_VOCAB_SIZE = 257
GPT_2: dict[str, Any] = {
    "norm": "layer_norm",
    "positions": "learned",
    "activation": "gelu_tanh",
}
"""Fields of a model with GPT-2's parts."""


def tiny_config(**sections: dict[str, Any] | str | int) -> RunConfig:
    """A two-layer model with everything routed; keyword arguments update whole sections."""
    tree: dict[str, Any] = {
        "run_dir": "unused",
        "seed": 7,
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_size": 64,
            "num_heads": 8,
            "num_kv_heads": 4,
            "sequence_length": 16,
            "bias": True,
            "init_std": 0.1,
            "router_init_std": 0.5,
        },
        "feed_forward": {"num_experts": 8, "top_k": 3},
        "attention": {"routed_layers": "all", "top_k": 2},
        "data": {"train": "unused"},
        "training": {
            "steps": 4,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "gradient_clipping": 0.5,
            "expert_products": "loop",  # or two runs could differ by what was faster in each
        },
    }
    for name, section in sections.items():
        old = tree.get(name)
        if isinstance(old, dict) and isinstance(section, dict):
            tree[name] = old | section
        else:
            tree[name] = section
    return RunConfig.model_validate(tree)


def write_corpus(prefix: Path, num_tokens: int = 2000, *, vocab_size: int = 256) -> Path:
    """Random tokens as one document at `prefix`.bin and .idx; returns `prefix`."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    builder.add_document(torch.from_numpy(tokens), [num_tokens])
    builder.finalize(get_idx_path(str(prefix)))
    return prefix
