"""Whatever shards the training state, what is computed again changes no bit of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.harness import Ranks
from tests.model.cases import build_model, start
from tests.tiny import tiny_config
from tests.training.cases import assemble, global_batch, run_engine
from uoe_parallel.config.schema import RunConfig

# Without these, ZeRO 3 keeps parameters as small as the tests' whole on every rank.
RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@pytest.mark.parametrize(
    ("world", "tensor", "zero_stage", "precision", "dropout"),
    [
        (1, 1, 0, "fp32", 0.0),
        (2, 2, 0, "fp32", 0.2),
        pytest.param(4, 2, 1, "fp32", 0.2, marks=pytest.mark.slow),
        (2, 1, 1, "bf16", 0.2),
        (2, 1, 2, "fp32", 0.2),
        pytest.param(4, 2, 3, "fp32", 0.2, marks=pytest.mark.slow),
    ],
)
def test_steps_with_recomputation_are_those_without(
    ranks: Ranks, world: int, tensor: int, zero_stage: int, precision: str, dropout: float
) -> None:
    plain, *others = (
        ranks(world).run(
            run_engine,
            tiny_config(
                model={"dropout": dropout, "attention_dropout": dropout},
                feed_forward={"routed_layers": [1]},
                attention={"routed_layers": [0]},
                parallel={"tensor": tensor, "zero_stage": zero_stage},
                training={
                    "micro_batch_size": 1,
                    "precision": precision,
                    "recompute": recompute,
                },
                deepspeed={"zero_optimization": RELEASED} if zero_stage == 3 else {},
            ),
        )
        for recompute in ("none", "selective", "full")
    )
    expected_weights = assemble(plain)
    for recomputed in others:
        for expected, found in zip(plain, recomputed, strict=True):
            assert found.losses == expected.losses
            assert found.gradient_norms == expected.gradient_norms
        weights = assemble(recomputed)
        assert weights.keys() == expected_weights.keys()
        for name, expected in expected_weights.items():
            assert torch.equal(weights[name], expected), name


def gathered_and_kept(config: RunConfig) -> tuple[int, set[str], int]:
    """Over a step: the most expert weights that were whole at a time, those whose gathered storage
    autograd kept, and how many are still whole in the end."""
    from uoe_parallel.training.engine import TrainingEngine

    groups = start(config)
    model = build_model(config, groups)
    engine = TrainingEngine(model, config, groups, torch.device("cpu"))
    ends = ("fc1.weight", "fc2.weight", "qkv.weight", "output.weight")
    weights = {name: p for name, p in model.named_parameters() if name.endswith(ends)}
    numbers: list[int] = []
    kept: set[str] = set()

    def whole() -> dict[int, str]:
        found = {p.untyped_storage().data_ptr(): n for n, p in weights.items() if p.numel() > 0}
        numbers.append(len(found))
        return found

    def look(module: nn.Module, arguments: object) -> None:
        whole()

    def pack(saved: Tensor) -> Tensor:
        name = whole().get(saved.untyped_storage().data_ptr())
        if name is not None:
            kept.add(name)
        return saved

    for module in model.modules():
        module.register_forward_pre_hook(look)  # after DeepSpeed's, which gathers
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        losses = engine.token_losses(global_batch(config, 0))
        assert losses is not None
        engine.deepspeed.backward(losses.sum())
    return max(numbers), kept, len(whole())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_zero3_gathers_one_expert_weight_at_a_time(ranks: Ranks, recompute: str) -> None:
    """In the forward pass, when it is repeated, and in the backward pass of what was repeated."""
    config = tiny_config(
        parallel={"zero_stage": 3},
        training={"recompute": recompute},
        deepspeed={"zero_optimization": RELEASED},
    )
    assert ranks(2).run(gathered_and_kept, config) == [(1, set(), 0)] * 2
