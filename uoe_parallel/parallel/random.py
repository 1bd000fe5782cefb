"""Which random numbers ranks share, and what is computed again in the backward pass.

DeepSpeed's tracker holds the streams, since its `checkpoint` winds back the tracker's streams and
the default generator alike, on a CPU as on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uoe_parallel.parallel.groups import ParallelGroups


class Stream(StrEnum):
    """A sequence of random numbers, named by the ranks that draw the same ones.

    Data ranks and pipeline stages always draw others: they hold other tokens or other layers.
    """

    TENSOR_GROUP = "tensor-group"
    """All ranks of a tensor group: for what each of them holds whole. They must draw alike."""
    RANK = "rank"
    """This rank alone: for its own heads, or its own part of the tokens."""


def stream_seed(seed: int, stream: Stream, *, stage: int, data_rank: int, tensor_rank: int) -> int:
    """The 64-bit seed of a stream on the rank at (stage, data_rank, tensor_rank).

    Not a sum of seed and ranks, which makes one run's streams those of another seed's ranks.
    """
    place = (stage, data_rank) if stream is Stream.TENSOR_GROUP else (stage, data_rank, tensor_rank)
    return int(np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0])


def seed_streams(seed: int, groups: ParallelGroups) -> None:
    """Start this process's streams anew. The default generator is left alone: nothing of ours
    draws from it."""
    tracker = _checkpointing().get_cuda_rng_tracker()
    tracker.reset()
    for stream in Stream:
        value = stream_seed(
            seed,
            stream,
            stage=groups.stage,
            data_rank=groups.data_rank,
            tensor_rank=groups.tensor_rank,
        )
        tracker.add(stream, value)


def draw_from(stream: Stream, probability: float) -> AbstractContextManager[object]:
    """While dropout of `probability` draws from the default generator, have it draw from `stream`.

    Costs nothing where the probability is 0. The streams must have been seeded.
    """
    if probability == 0:
        return nullcontext()
    return _checkpointing().get_cuda_rng_tracker().fork(stream)


def recompute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which only the inputs are kept for the backward pass.

    The function runs without gradients now and with them in the backward pass, when both the
    streams and the default generator are as they were now. Without gradients, and where no input
    requires one, which would leave the function's parameters without theirs, it is simply called.
    """
    if not _differentiates(*inputs):
        return function(*inputs)
    y = _checkpointing().checkpoint(function, *inputs)
    assert isinstance(y, Tensor)
    return y


def recompute_between(
    function: Callable[[Tensor], Tensor], linear: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """linear(function(x)), of which only `x` is kept for the backward pass.

    For a function that draws nothing, fills new memory, and is cheap: it runs twice more. `linear`
    keeps its input itself for the gradient of its weight. That input's memory is given back and,
    before the backward pass of `linear`, filled again.
    """
    y = recompute(function, x)
    z = linear(y)
    if _differentiates(x):
        storage = y.untyped_storage()
        size = storage.nbytes()

        @torch.no_grad()
        def refill(_: Tensor) -> None:
            storage.resize_(size)
            storage.copy_(function(x).untyped_storage())
            handle.remove()  # and with it what this function holds

        handle = z.register_hook(refill)
        storage.resize_(0)
    return z


def _differentiates(*inputs: Tensor) -> bool:
    """Whether a backward pass may come back to one of them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def shared_stream() -> Tensor:
    """The state of `Stream.TENSOR_GROUP`, the same on all ranks of a tensor group."""
    return _checkpointing().get_cuda_rng_tracker().get_states()[Stream.TENSOR_GROUP]


def random_states(groups: ParallelGroups) -> dict[str, Tensor]:
    """What this rank has to save, by keys that are unique over all ranks."""
    tracker, keys = _checkpointing().get_cuda_rng_tracker(), _stream_keys(groups)
    states = {keys[name]: state for name, state in tracker.get_states().items()}
    if groups.tensor_rank > 0:
        states.pop(keys[Stream.TENSOR_GROUP], None)
    states[f"random/rank-{groups.rank}/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states[f"random/rank-{groups.rank}/cuda"] = torch.cuda.get_rng_state()
    return states


def random_setters(groups: ParallelGroups) -> dict[str, Callable[[Tensor], Any]]:
    """What takes back each state that concerns this rank, by its key."""
    tracker = _checkpointing().get_cuda_rng_tracker()

    def set_stream(name: str, state: Tensor) -> None:
        tracker.set_states(tracker.get_states() | {name: state})

    setters: dict[str, Callable[[Tensor], Any]] = {
        key: partial(set_stream, name) for name, key in _stream_keys(groups).items()
    }
    setters[f"random/rank-{groups.rank}/cpu"] = torch.set_rng_state
    if torch.cuda.is_available():
        setters[f"random/rank-{groups.rank}/cuda"] = torch.cuda.set_rng_state
    return setters


def _stream_keys(groups: ParallelGroups) -> dict[str, str]:
    """Names streams by place, not by rank: in another layout the ranks that must share a stream
    still take up the same one. They end in the device, whose states fit no other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor_group = f"random/stage-{groups.stage}/data-{groups.data_rank}"
    return {
        Stream.TENSOR_GROUP: f"{tensor_group}/{device}",
        Stream.RANK: f"{tensor_group}/tensor-{groups.tensor_rank}/{device}",
    }


def _checkpointing() -> ModuleType:
    # DeepSpeed picks its accelerator when it is imported: after the device is chosen.
    from deepspeed import checkpointing

    return checkpointing
