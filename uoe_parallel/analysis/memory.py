"""What one rank holds at the moment of a training step at which it holds the most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uoe_parallel.analysis.states import StateRules
from uoe_parallel.analysis.traffic import micro_batches
from uoe_parallel.analysis.work import Workload
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.model.language_model import LanguageModel

Moment = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the moment of a step when the most are held, by what they are for."""

    moment: Moment
    weights: int
    """In the type of the passes, as they lie between steps."""
    gradients: int
    optimizer: int
    """Moments, and masters where there are any."""
    buffers: int
    """DeepSpeed's: reduce buckets, flat copies, weights gathered for use."""
    activations: int
    """Kept for the backward passes of all micro-batches in flight, logits and losses included."""
    dispatch: int
    """Rows on their way to experts and back, and those of other ranks that are kept for backward."""
    working: int
    """What the block that computes at this moment, or AdamW, needs on top."""

    @property
    def peak(self) -> int:
        """All of it."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.buffers
            + self.activations
            + self.dispatch
            + self.working
        )


def step_memory(
    model: LanguageModel,
    config: RunConfig,
    work: Workload,
    micro_batches_in_flight: int | None = None,
) -> StepMemory:
    """Of training `model`, a rank's stage as it is before DeepSpeed gets it, on meta too.

    work: of each of its routed blocks in one micro-batch. micro_batches_in_flight: whose
    activations are held at a time; None for those of DeepSpeed's schedule (1F1B).
    """
    groups, model_config = model.groups, config.model
    rules = StateRules(model, config)
    states = rules.model_states()
    if micro_batches_in_flight is None:
        number = micro_batches(config, groups.layout)
        micro_batches_in_flight = min(groups.pipe.size() - groups.stage, number)
    tokens = config.training.micro_batch_size * model_config.sequence_length
    hidden = tokens * model_config.hidden_size * rules.element
    kept = 0
    dispatch = 0
    for block in work.values():
        dispatch += 2 * block.rows * model_config.hidden_size * rules.element
        kept += 4 * block.pairs * model_config.hidden_size * rules.element
    kept += 12 * hidden * len(model.layers)
    return StepMemory(
        moment="backward",
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        buffers=states.gradients,
        activations=micro_batches_in_flight * kept,
        dispatch=micro_batches_in_flight * dispatch,
        working=4 * hidden,
    )
