"""How DeepSpeed keeps the parameters of a stage, and how much memory that takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from uoe_parallel.analysis.zero3 import Gatherings, gatherings
from uoe_parallel.config.deepspeed import deepspeed_config
from uoe_parallel.config.schema import Recompute, RunConfig
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.device import DTYPES
from uoe_parallel.parallel.sharding import replica_group
from uoe_parallel.training.optimizer import parameter_groups

_MASTERED = 4 + 2 * 4
"""Bytes of an fp32 master and its moments."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes that a rank holds for its part of the model from one step to the next. Activations and
    what is there for the time of a step (buckets, weights gathered for use) come on top."""

    weights: int
    """In the type of the passes."""
    gradients: int
    """As they have added up when the next micro-batch begins."""
    optimizer: int
    """Moments, and masters where the weights that AdamW steps are others than the model's."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


class StateRules:
    """In which groups, types and partitions DeepSpeed keeps a stage's parameters.

    `model` is a stage as DeepSpeed gets it, and may lie on meta.
    """

    def __init__(self, model: LanguageModel, config: RunConfig) -> None:
        self.model = model
        self.params = list(model.parameters())
        self.trained = [param for param in self.params if param.requires_grad]
        self.groups = model.groups
        self.stage = config.parallel.zero_stage
        self.recompute: Recompute = config.training.recompute
        settings = deepspeed_config(config, model.groups.layout.data)
        self.zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
        dtype = DTYPES[config.training.precision]
        self.is_bf16 = dtype is torch.bfloat16
        self.is_flat_bf16 = self.is_bf16 and (
            self.stage == 1 or (self.stage == 0 and model.groups.pipe.size() > 1)
        )
        """Whether DeepSpeed wraps AdamW in its BF16_Optimizer."""
        self.element = dtype.itemsize
        """Bytes of a weight's element in the passes."""
        self.reduced_element = {"fp16": 2, "bf16": 2, "fp32": 4, None: self.element}[
            settings.get("communication_data_type")
        ]
        """Bytes of a gradient's element while it is reduced."""
        self.parameter_groups: list[list[nn.Parameter]] = [
            group["params"] for group in parameter_groups(model, config.training)
        ]
        """The optimizer's."""

    def replicas(self, param: nn.Parameter) -> int:
        """Ranks that hold the same part of a parameter, before ZeRO."""
        return replica_group(param, self.groups).size()

    def padded_size(self, params: list[nn.Parameter]) -> int:
        """Elements of one of the optimizer's groups, laid out flat by ZeRO 1 and 2 to be cut in
        equal parts, each of a multiple of two."""
        parts = 2 * self.replicas(params[0])
        return -(-sum(param.numel() for param in params) // parts) * parts

    def part_size(self, params: list[nn.Parameter]) -> int:
        """Elements of one of these parts."""
        return self.padded_size(params) // self.replicas(params[0])

    def touched(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of which something lies in this rank's part."""
        each = self.part_size(params)
        first = each * replica_group(params[0], self.groups).rank()
        return [p for p, (a, b) in spans(params) if a < first + each and b > first]

    def partition_size(self, param: nn.Parameter) -> int:
        """Elements that each rank keeps of a parameter under ZeRO 3."""
        return -(-param.numel() // self.replicas(param))

    def kept_whole(self) -> list[nn.Parameter]:
        """Parameters that ZeRO 3 finds too small to gather for every use."""
        kept: list[nn.Parameter] = []
        total = 0
        for param in self.params:
            size = param.numel()
            if size > self.zero.param_persistence_threshold:
                continue
            if size + total <= self.zero.model_persistence_threshold:
                kept.append(param)
                total += size
        return kept

    @cached_property
    def gatherings(self) -> Gatherings:
        """Those of ZeRO 3."""
        return gatherings(self.model, self.zero, self.kept_whole(), self.recompute)

    @cached_property
    def states(self) -> ModelStates:
        """Of this rank."""
        whole = sum(param.numel() for param in self.trained)
        frozen = sum(param.numel() for param in self.params) - whole
        padded = sum(map(self.padded_size, self.parameter_groups))
        part = sum(map(self.part_size, self.parameter_groups))
        weights = self.element * (padded + frozen)
        if self.stage == 3:
            part = sum(map(self.partition_size, self.trained))
            held = sum(map(self.partition_size, self.params))
            held += sum(param.numel() for param in self.kept_whole())
            return ModelStates(self.element * held, 4 * part, _MASTERED * part)
        if self.is_flat_bf16:
            # Also without ZeRO, where sums are bf16, it keeps one part of masters and moments.
            # The last pass's own gradients stay until the next one begins.
            sums = (4 if self.stage == 1 else self.element) * padded
            gradients = sums + self.element * whole
            return ModelStates(weights, gradients, _MASTERED * part)
        if self.stage == 0:
            optimizer = _MASTERED if self.is_bf16 else 2 * self.element
            weights = self.element * (whole + frozen)
            return ModelStates(weights, self.element * whole, optimizer * whole)
        added_up = whole
        if self.stage == 2:  # fp32 gradients are kept whole if the rank steps any of their elements
            own = chain.from_iterable(map(self.touched, self.parameter_groups))
            added_up = part if self.is_bf16 else sum(param.numel() for param in own)
        return ModelStates(weights, 4 * added_up, _MASTERED * part)


def spans(params: list[nn.Parameter]) -> list[tuple[nn.Parameter, tuple[int, int]]]:
    """Where each parameter begins and ends, laid out one after the other."""
    ends = list(accumulate(param.numel() for param in params))
    return list(zip(params, pairwise([0, *ends]), strict=True))
