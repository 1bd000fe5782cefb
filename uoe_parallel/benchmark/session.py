"""What every measurement gets: ranks, sizes, and this project's blocks built from a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uoe_parallel.benchmark.sizes import Sizes
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.backends import Backend
from uoe_parallel.model.block import DenseBlock
from uoe_parallel.model.builder import LayerBuilder
from uoe_parallel.model.context import Context, micro_batch_context
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import ParallelGroups

DTYPE = torch.float32


@dataclass(frozen=True)
class Session:
    """One measuring process, on every rank. The tensor group has all ranks, and sequences are
    sharded over it."""

    groups: ParallelGroups
    device: Device
    sizes: Sizes
    backend: Backend
    """Of this project's layers."""
    rounds: int
    """Counted rounds of each timing."""
    warmup: int = 2

    def feed_forward(self, sizes: Sizes, *, routed: bool) -> DenseBlock:
        """A routed feed-forward block, or a dense one of width `sizes.ffn`."""
        return self._builder(sizes, feed_forward=_routed(routed, sizes)).feed_forward(0)

    def attention(self, sizes: Sizes, *, routed: bool) -> DenseBlock:
        """Causal attention whose experts are the heads, or dense."""
        return self._builder(sizes, attention=_routed(routed, sizes, heads=True)).attention(0)

    def context(self, sizes: Sizes) -> Context:
        """Sequences of one document each."""
        shape = (sizes.batch, sizes.sequence)
        return micro_batch_context(shape, None, self.groups, self.device.torch_device)

    def hidden_states(self, sizes: Sizes, seed: int) -> Tensor:
        """This rank's shard [S/P, B, D] of random hidden states of unit variance; the whole is the
        same on any number of ranks."""
        generator = torch.Generator().manual_seed(seed)
        shape = (sizes.sequence, sizes.batch, sizes.hidden)
        whole_SBD = torch.randn(shape, generator=generator, dtype=DTYPE)
        shard = whole_SBD.chunk(self.groups.tensor.size())[self.groups.tensor_rank]
        return shard.to(self.device.torch_device).contiguous()

    def _builder(self, sizes: Sizes, **sections: dict[str, Any]) -> LayerBuilder:
        config = RunConfig.model_validate(
            {
                "run_dir": "unused",
                "model": {
                    "num_layers": 1,
                    "hidden_size": sizes.hidden,
                    "ffn_size": sizes.ffn,
                    "num_heads": sizes.heads,
                    "sequence_length": sizes.sequence,
                    "activation": "gelu",
                },
                "parallel": {"tensor": self.groups.tensor.size()},
                "data": {"train": "unused"},
                "training": {
                    "steps": 1,
                    "global_batch_size": sizes.batch,
                    "micro_batch_size": sizes.batch,
                    "learning_rate": 1e-3,
                },
                **sections,
            }
        )
        return LayerBuilder(config, self.groups, self.backend, DTYPE)


def _routed(routed: bool, sizes: Sizes, heads: bool = False) -> dict[str, Any]:
    own = {} if heads else {"num_experts": sizes.experts}
    return {"routed_layers": "all" if routed else "none", "top_k": sizes.top_k, **own}
