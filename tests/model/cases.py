"""What runs inside the rank processes for the model's tests."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tests.tiny import USED_VOCAB_SIZE, VOCAB_SIZE
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.backends import Backend, GroupedBackend, LoopBackend
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.groups import ParallelGroups, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.random import seed_streams
from uoe_parallel.parallel.sharding import gather_full


def start(config: RunConfig) -> ParallelGroups:
    use_device(0)
    groups = start_groups(ParallelLayout.from_config(config.parallel, dist.get_world_size()))
    seed_streams(config.seed, groups)
    return groups


def build_model(
    config: RunConfig,
    groups: ParallelGroups,
    dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> LanguageModel:
    if backend is None:
        backend = LoopBackend() if dtype is torch.float64 else GroupedBackend()
    return LanguageModel(
        config,
        groups,
        vocab_size=VOCAB_SIZE,
        used_vocab_size=USED_VOCAB_SIZE,
        backend=backend,
        dtype=dtype,
    )


def random_tokens(config: RunConfig, seed: int = 3) -> Tensor:
    """Ids [B, S] of a whole step."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.training.global_batch_size, config.model.sequence_length)
    return torch.randint(0, USED_VOCAB_SIZE, shape, generator=generator)


def own_shard(x_SBD: Tensor, groups: ParallelGroups) -> Tensor:
    """This rank's positions of a tensor that every rank holds whole."""
    if not groups.layout.sequence_parallel:
        return x_SBD
    return x_SBD.chunk(groups.tensor.size())[groups.tensor_rank]


def full_gradients(model: LanguageModel, groups: ParallelGroups) -> dict[str, Tensor]:
    gradients = {}
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        gradients[name] = gather_full(param, groups.tensor, param.grad)
    return gradients


def loss_and_gradients(config: RunConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """fp32: token losses [B, S], and full gradients of their mean with the balance losses."""
    groups = start(config)
    model = build_model(config, groups)
    tokens = random_tokens(config)
    losses = model(tokens, tokens.roll(-1, 1))
    losses.mean().backward()
    return losses.detach(), full_gradients(model, groups)


def hidden_and_gradients(config: RunConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """fp64: hidden states [S, B, D] and full gradients of a random linear function of them.

    Not through the loss, which megatron-core computes in fp32 whatever it gets.
    """
    groups = start(config)
    model = build_model(config, groups, torch.float64)
    hidden = model.hidden(random_tokens(config))
    generator = torch.Generator().manual_seed(5)
    shape = (config.model.sequence_length, *hidden.shape[1:])
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    (hidden * own_shard(direction, groups)).sum().backward()
    shards = [torch.empty_like(hidden) for _ in range(groups.tensor.size())]
    dist.all_gather(shards, hidden.detach().contiguous(), group=groups.tensor)
    whole = torch.cat(shards) if groups.layout.sequence_parallel else shards[0]
    for module in (model.final_norm, model.head):  # not reached
        assert module is not None
        for param in module.parameters():
            param.grad = torch.zeros_like(param)
    return whole, full_gradients(model, groups)


def relative_difference(
    got: dict[str, Tensor], expected: dict[str, Tensor], eps: float
) -> tuple[float, str]:
    """The largest |got - expected| over max(own norm, eps x global norm), and whose it is."""
    assert got.keys() == expected.keys()
    global_norm = torch.stack([e.double().norm() for e in expected.values()]).norm()
    differences = {
        name: float(
            (got[name].double() - e.double()).norm()
            / torch.maximum(e.double().norm(), eps * global_norm)
        )
        for name, e in expected.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    return differences[worst], worst
