"""What we say to megatron-core's layers, and the place for what differs between its versions."""

from __future__ import annotations

import torch
from megatron.core.model_parallel_config import ModelParallelConfig

from uoe_parallel.parallel.layout import ParallelLayout


def megatron_config(layout: ParallelLayout, dtype: torch.dtype) -> ModelParallelConfig:
    """The config of column/row parallel linears and of the vocabulary-parallel embedding.

    CPU initialisation makes the full weight from the given init method on every rank and keeps
    the rank's part: equal seeds then give equal full weights under every layout.
    """
    return ModelParallelConfig(
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=True,
        gradient_accumulation_fusion=False,
        deterministic_mode=False,
    )
