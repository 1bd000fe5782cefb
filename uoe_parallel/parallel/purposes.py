"""What collectives are for: the names, and how a collective that is called knows its own.

A purpose is named where a layer calls a collective, and is then ambient while that runs. Its
backward pass comes later, from autograd's engine: for that the name is left with the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Phase = Literal["forward", "recompute", "backward", "step"]
"""Where in an optimizer step: in the forward pass, in what the backward pass repeats of it, in the
rest of that, or before, between and after the passes."""

Category = Literal[
    "dispatch", "combine", "gather", "reduce", "pipeline", "gradient", "ZeRO", "control"
]
"""Kinds of purposes: tokens' ways to experts and back; what is gathered of tokens, and summed, by
layers that are cut over ranks; between stages; gradients of weights; weights of which each rank
keeps a part; and the small messages that keep ranks in step."""


class Purpose(StrEnum):
    """Of a collective, with its category."""

    category: Category

    def __new__(cls, name: str, category: Category) -> Purpose:
        purpose = str.__new__(cls, name)
        purpose._value_ = name
        purpose.category = category
        return purpose

    DISPATCH_COUNTS = "dispatch counts", "dispatch"
    DISPATCH_ROWS = "dispatch rows", "dispatch"
    DISPATCH_GATES = "dispatch gates", "dispatch"
    COMBINE_ROWS = "combine rows", "combine"
    GATHERED_ROWS = "gathered rows", "gather"
    GATHERED_GATES = "gathered gates", "gather"
    SCORES = "routing scores", "gather"
    DOCUMENTS = "documents", "gather"
    REPLICATED_ROWS = "replicated rows", "reduce"
    REPLICATED_GATES = "replicated gates", "reduce"
    EMBEDDING = "embedding", "reduce"
    DENSE_BLOCKS = "dense blocks", "reduce"
    HEAD = "head", "reduce"
    LOSS = "loss", "reduce"
    STAGE_OUTPUTS = "stage outputs", "pipeline"
    STAGE_INPUTS = "stage inputs", "pipeline"
    REPLICATED_WEIGHTS = "gradients of replicated weights", "gradient"
    TIED_EMBEDDING = "gradients of the tied embedding", "gradient"
    GRADIENTS = "gradients", "gradient"
    WEIGHTS = "weights", "ZeRO"
    KEPT_WEIGHTS = "weights kept whole", "ZeRO"
    BALANCE = "balance counts", "control"
    RULES = "routing rules", "control"
    JUDGEMENT = "loss and gradient norm", "control"
    DEEPSPEED_CHECKS = "DeepSpeed's checks", "control"
    DEEPSPEED_LOSS = "DeepSpeed's loss", "control"
    TOKEN_RANGE = "smallest and largest token", "control"
    STEP_AGREEMENT = "whether to take the step", "control"
    VALID_TOKENS = "number of valid tokens", "control"
    SETUP = "setup", "control"
    AGREEMENT = "agreement", "control"
    REPORT = "report", "control"
    EVALUATION = "evaluation", "control"
    CHECKPOINT = "checkpoint", "control"
    REPLICAS = "checksums of replicas", "control"
    MEASUREMENT = "measurement", "control"
    OTHER = "other", "control"


P = ParamSpec("P")
R = TypeVar("R")
_Label = tuple[Purpose, ProcessGroup]

_KEY = "uoe_parallel.purpose"
_label: ContextVar[_Label | None] = ContextVar("label", default=None)
_phase: ContextVar[Phase] = ContextVar("phase", default="step")
_is_aside: ContextVar[bool] = ContextVar("is_aside", default=False)


def labelled(
    purpose: Purpose,
    group: ProcessGroup,
    function: Callable[P, R],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """function(*args, **kwargs), whose collectives on `group` are for `purpose`, also those of the
    backward pass of the operation that made its result, or the first of its results.

    Only on `group`: DeepSpeed gathers weights in the midst of what others do.
    """
    label = (purpose, group)
    before = _label.set(label)
    try:
        result = function(*args, **kwargs)
    finally:
        _label.reset(before)
    made: Any = result[0] if isinstance(result, tuple) else result
    if isinstance(made, Tensor) and made.grad_fn is not None:
        _metadata(made.grad_fn)[_KEY] = label
    return result


@contextmanager
def during(phase: Phase) -> Iterator[None]:
    """What is called in the block, and not by a backward pass, is of `phase`."""
    before = _phase.set(phase)
    try:
        yield
    finally:
        _phase.reset(before)


@contextmanager
def aside() -> Iterator[None]:
    """What is called in the block, by a thread beside the one that trains, is no part of the run's
    own sequence of collectives: those who look on at that leave it out, or apart."""
    before = _is_aside.set(True)
    try:
        yield
    finally:
        _is_aside.reset(before)


def is_aside() -> bool:
    """Whether what is being called is `aside`."""
    return _is_aside.get()


def current_purpose(group: ProcessGroup) -> Purpose | None:
    """Of a collective that is being called on `group`; None if nobody named one."""
    label = _label.get()
    if label is None or label[1] is not group:
        node = torch._C._current_autograd_node()
        label = None if node is None else _metadata(node).get(_KEY)
    return label[0] if label is not None and label[1] is group else None


def _metadata(node: Any) -> dict[str, Any]:
    """A dictionary, though it is declared as a method."""
    return node.metadata


def current_phase() -> Phase:
    """Of what is being called."""
    node = torch._C._current_autograd_node()
    if node is None:
        return _phase.get()
    # Megatron's checkpoint calls its function again in the backward pass of its own node; that
    # function's backward pass then has nodes of its own.
    return "recompute" if node.name() == "CheckpointFunctionBackward" else "backward"
