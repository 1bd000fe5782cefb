"""What runs inside the rank processes for the tests of analysis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.model.cases import start
from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.observe import Call, CollectiveObserver, Observed
from uoe_parallel.analysis.simulate import (
    ParameterPlace,
    Simulation,
    build_stage,
    parameter_places,
    simulate_world,
)
from uoe_parallel.analysis.traffic import Exchanges, blocks_that_exchange
from uoe_parallel.analysis.transfer import group_ranks
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.dispatch import dispatcher
from uoe_parallel.experts.backends import LoopBackend
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.device import use_device
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.state import base_optimizer
from uoe_parallel.training.trainer import Trainer

Seen = dict[tuple[str, tuple[int, ...]], Observed]
Purposes = dict[tuple[str, str, str, tuple[int, ...]], Observed]
"""By (purpose, phase, operation, ranks)."""


@dataclass(frozen=True)
class RealStep:
    """One rank's third optimizer step, as it was."""

    seen: Purposes
    exchanges: Exchanges
    shapes: dict[str, tuple[int, ...]]
    weights: int
    """Bytes of the model's weights that were held after it."""
    gradients: list[int]
    """Bytes of gradients at each forward pass that followed a backward pass."""
    optimizer: int
    """Bytes of moments and of masters."""


def take_steps(config: RunConfig) -> RealStep:
    """Three steps of training; the third is watched."""
    groups = start(config)
    blocks = blocks_that_exchange(build_stage(config, groups))
    trainer = Trainer(config, groups, use_device(0), TrainingConsole(quiet=True))
    for _ in range(2):
        trainer.train_step()
    shapes: dict[str, tuple[int, ...]] = {}
    gradients = _noted_gradients(trainer)
    _note_shapes(trainer.model, shapes)
    recomputes = config.training.recompute == "full"
    with _recorded_exchanges(recomputes) as recorded, CollectiveObserver(groups) as observer:
        trainer.train_step()
    exchanges = {name: recorded[i :: len(blocks)] for i, name in enumerate(blocks)}
    weights, optimizer = _held(trainer)
    return RealStep(_by_purpose(observer), exchanges, shapes, weights, gradients, optimizer)


def _by_purpose(observer: CollectiveObserver) -> Purposes:
    seen: dict[tuple[str, str, str, tuple[int, ...]], list[Call]] = defaultdict(list)
    for call in chain.from_iterable(observer.calls.values()):
        seen[call.purpose, call.phase, call.operation, call.ranks].append(call)
    return {key: Observed.of(calls) for key, calls in seen.items()}


@contextmanager
def _recorded_exchanges(recomputes: bool) -> Iterator[list[ExchangeSizes]]:
    """The sizes of all exchanges that are planned in forward passes, in order."""
    recorded: list[ExchangeSizes] = []
    original = dispatcher.plan_exchange

    def plan_and_record(*arguments: Any) -> Any:
        plan = original(*arguments)
        if torch.is_grad_enabled() != recomputes:  # the second pass is the one with gradients
            recorded.append(ExchangeSizes.of_plan(plan))
        return plan

    dispatcher.plan_exchange = plan_and_record
    try:
        yield recorded
    finally:
        dispatcher.plan_exchange = original


def _note_shapes(model: LanguageModel, shapes: dict[str, tuple[int, ...]]) -> None:
    """Into `shapes`, as forward passes come to know them."""

    def note_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes["token ids"] = tuple(inputs[0].shape)

    def note_output(module: nn.Module, _: object, output: Tensor) -> None:
        name = "logits" if module is model.head else "hidden states"
        shapes[name] = tuple(output.shape)

    if model.groups.is_first_stage and model.embedding is not None:
        model.embedding.register_forward_pre_hook(note_inputs)
    for module in (*model.layers.values(), model.head):
        if module is not None:
            module.register_forward_hook(note_output)


def _held(trainer: Trainer) -> tuple[int, int]:
    """Bytes of weights, and of what AdamW has beside them: whole storages, each once."""
    weights: dict[int, int] = {}

    def note(tensor: Tensor, noted: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        noted[storage.data_ptr()] = storage.nbytes()

    for param in trainer.model.parameters():
        if param.numel() > 0:
            note(param.data, weights)
        if (partition := getattr(param, "ds_tensor", None)) is not None:
            note(partition, weights)
    adamw, states = base_optimizer(trainer.engine.deepspeed), {}
    flat = getattr(trainer.engine.deepspeed.optimizer, "fp32_partitioned_groups_flat", None)
    stepped = flat or [p for group in adamw.param_groups for p in group["params"]]
    for tensor in stepped:
        note(tensor.data, states)
        for moment in ("exp_avg", "exp_avg_sq"):
            note(adamw.state[tensor][moment], states)
    return sum(weights.values()), sum(n for key, n in states.items() if key not in weights)


def _noted_gradients(trainer: Trainer) -> list[int]:
    """Bytes at each forward pass from now on that follows a backward pass."""
    noted: list[int] = []
    backwards: list[int] = []

    def note(*_: object) -> None:
        if backwards:
            noted.append(_held_gradients(trainer))

    layer = next(iter(trainer.model.layers.values()))
    layer.register_full_backward_hook(lambda *_: backwards.append(1))
    layer.register_forward_pre_hook(note)
    return noted


def _held_gradients(trainer: Trainer) -> int:
    """Bytes of gradients that are there now, wherever DeepSpeed keeps them."""
    wrapper = trainer.engine.deepspeed.optimizer
    held: list[Tensor | None] = []
    for param in trainer.model.parameters():
        held += [param.grad, getattr(param, "grad_accum", None)]
    for gradients in getattr(wrapper, "all_grad_tensors", {}).values():
        held += gradients or []
    for gradients in getattr(wrapper, "averaged_gradients", {}).values():
        held.append(getattr(gradients, "flat_partition", None))
    held += getattr(wrapper, "fp32_groups_gradients_flat", [])
    held.append(getattr(wrapper, "grad_partitions_flat_buffer", None))
    return sum(g.numel() * g.element_size() for g in held if g is not None)


def simulate(
    config: RunConfig,
    world_size: int,
    ranks: Sequence[int],
    exchanges: Sequence[Exchanges] | None = None,
    **options: Any,
) -> list[Simulation]:
    """Some ranks of a world, one after the other in this process."""
    dist.destroy_process_group()
    simulations = []
    for number, rank in enumerate(ranks):
        given = None if exchanges is None else exchanges[number]
        simulation = simulate_world(config, world_size, rank, exchanges=given, **options)
        simulations.append(simulation)
        assert not dist.is_initialized()
    return simulations


def places_in_a_run(
    config: RunConfig, vocab_size: int
) -> tuple[dict[str, tuple[int, ...]], list[ParameterPlace]]:
    """Groups, and the places of the parameters of a model with data."""
    groups = start(config)
    model = LanguageModel(
        config,
        groups,
        vocab_size=vocab_size,
        used_vocab_size=vocab_size,
        backend=LoopBackend(),
    )
    assert all(param.device.type == "cpu" for param in model.parameters())
    return group_ranks(groups), parameter_places(model)


def stage_is_on_meta(config: RunConfig) -> bool:
    stage: nn.Module = build_stage(config, start(config))
    return all(p.is_meta for p in stage.parameters()) and torch.get_default_device().type == "cpu"
