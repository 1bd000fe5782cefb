"""What one rank holds at the moment of a training step at which it holds the most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uoe_parallel.analysis.activations import Activations, Bytes
from uoe_parallel.analysis.buffers import Held, StepBuffers
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
    """Rows on their way to experts and back, and what is kept of those of other ranks."""
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
    *,
    on_cuda: bool = True,
) -> StepMemory:
    """Of training `model`, a rank's stage as it is before DeepSpeed gets it, on meta too.

    work: of each of its routed blocks in one micro-batch. micro_batches_in_flight: whose
    activations are held at a time; None for those of DeepSpeed's schedule (1F1B). on_cuda: whether
    it runs on a GPU, whose kernels keep less than a CPU's.
    """
    number = micro_batches(config, model.groups.layout)
    if micro_batches_in_flight is None:
        micro_batches_in_flight = min(model.groups.pipe.size() - model.groups.stage, number)
    stage = Activations(model, config, work, on_cuda=on_cuda).stage()
    others = stage.kept.times(micro_batches_in_flight - 1)
    rules = StepBuffers(model, config, number)

    def moment(name: Moment, held: Bytes, of_deepspeed: Held) -> StepMemory:
        return StepMemory(
            moment=name,
            weights=rules.states.weights,
            gradients=of_deepspeed.gradients,
            optimizer=rules.states.optimizer,
            buffers=of_deepspeed.buffers,
            activations=held.activations,
            dispatch=held.dispatch,
            working=held.working,
        )

    moments = [moment("forward", others + stage.forward, rules.forward())]
    moments += [
        moment("backward", others + point.held, rules.backward(point.made, point.making))
        for point in stage.points
    ]
    moments += [moment("optimizer", Bytes(), held) for held in rules.optimizer()]
    return max(moments, key=lambda moment: moment.peak)
