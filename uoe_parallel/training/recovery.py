"""What a run does about anomalies, and about replicas that differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from uoe_parallel.checkpoint import CheckpointReader, find_checkpoint
from uoe_parallel.errors import UserError
from uoe_parallel.training.anomalies import Anomaly
from uoe_parallel.training.engine import StepResult
from uoe_parallel.training.metrics import Value
from uoe_parallel.training.replicas import Replicas

if TYPE_CHECKING:
    from uoe_parallel.training.trainer import Trainer


class Recovery:
    """Part of a `Trainer`. Everything here is collective over all ranks, and each case an event of
    the metrics and a line on the console."""

    def __init__(self, trainer: Trainer, restore: Callable[[CheckpointReader], None]) -> None:
        self._trainer = trainer
        self._restore = restore
        self._replicas = Replicas(trainer.engine, trainer.groups)

    def tell(self, result: StepResult, anomaly: Anomaly) -> None:
        """Of a step that was not taken; raises UserError if that ends the run."""
        trainer, training = self._trainer, self._trainer.config.training
        numbers: dict[str, Value] = {"loss": result.loss, "gradient_norm": result.gradient_norm}
        self._record(trainer.step + 1, anomaly.what, anomaly.action, numbers)
        for block in trainer.model.routed_blocks().values():
            block.statistics.reset()  # whose sums may not be numbers any more
        if anomaly.action == "stop":
            raise UserError(
                f"{anomaly.what}, and training stopped before it reached the weights. Checkpoints "
                "in the run folder are untouched: lower training.learning_rate "
                f"({training.learning_rate}), raise training.warmup_steps "
                f"({training.warmup_steps}) or let the section anomalies of the config pass over "
                "such steps, and start again to continue from the newest one"
            )

    def roll_back(self, anomaly: Anomaly) -> None:
        """Go back, and on with the data that comes after that of the step with the anomaly."""
        behind = self._trainer.progress.batch
        self._go_back(anomaly.what)
        self._trainer.progress.batch = behind

    def replicas_agree(self) -> bool:
        """Whether ranks hold alike what they should, as far as the config has it checked. If not,
        the run is back at its newest checkpoint, or ends with a UserError."""
        trainer, config = self._trainer, self._trainer.config.replicas
        if config.check_every == 0:
            return True
        mismatch = self._replicas.mismatch(trainer.progress)
        if mismatch is None:
            return True
        too_many = trainer.engine.guard.count(trainer.step - 1)
        action = "stop" if too_many else config.on_mismatch
        what = f"{mismatch} after step {trainer.step}"
        where: dict[str, Value] = {"tensor": mismatch.name, "ranks": mismatch.ranks}
        self._record(trainer.step, what, action, where)
        if action == "stop":
            raise UserError(
                f"{what}, and training stopped. Nothing of it is in a checkpoint: see to the "
                "devices of these ranks, and start again to continue from the newest one"
            )
        self._go_back(what)
        return False

    def _record(self, step: int, what: str, action: str, values: dict[str, Value]) -> None:
        self._trainer.console.say(f"{what}: {action}")
        self._trainer.folder.record(step, "event", {"what": what, **values, "done": action})

    def _go_back(self, reason: str) -> None:
        """Continue from the newest checkpoint, as if what came after it had not been."""
        trainer = self._trainer
        trainer.saver.finish()
        reader = find_checkpoint(trainer.folder.checkpoints, trainer.groups.world)
        if reader is None:
            raise UserError(
                f"{reason}, and there is no checkpoint to go back to: have one written sooner, by "
                f"a smaller checkpoint.every ({trainer.config.checkpoint.every}), and start again"
            )
        self._restore(reader)
        trainer.folder.forget_after(trainer.step)
        trainer.console.say(
            f"back at {reader.path}: {trainer.step} of {trainer.config.training.steps} steps are "
            "done"
        )
