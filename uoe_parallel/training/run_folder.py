"""The files of a run beside its checkpoints: the lock, the resolved config and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from uoe_parallel.config.load import save_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.training.metrics import Kind, MetricsWriter, Value
from uoe_parallel.training.run_lock import RunLock


class RunFolder:
    """Used by every rank alike: rank 0 writes, and what fails there ends all ranks."""

    def __init__(self, config: RunConfig, groups: ParallelGroups) -> None:
        self.path = Path(config.run_dir)
        self._config = config
        self._groups = groups
        self._lock = RunLock(self.path)
        self._metrics: MetricsWriter | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def lock(self) -> None:
        """Keep other runs out, before anything here is read. Collective over all ranks. Raises
        UserError on every rank if another run is here or the folder can't be written."""
        with shared_fate(*self._unwritable, self._groups.world):
            if self._groups.is_main:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()

    def confirm(self) -> None:
        """Raises UserError on every rank if another run has taken the folder over. Collective over
        all ranks."""
        with shared_fate(*self._unwritable, self._groups.world):
            if self._groups.is_main:
                self._lock.confirm()

    def open(self, step: int | None) -> None:
        """Begin to write, after `step` steps of a run that goes on, or anew. Collective over all
        ranks. Raises UserError on every rank if the folder can't be written."""
        with shared_fate(*self._unwritable, self._groups.world):
            if self._groups.is_main:
                save_config(self._config, self.path / "config.yaml")
                self._metrics = MetricsWriter(self.path, self._config.logging.tensorboard)
                self._metrics.truncate_after(-1 if step is None else step)

    def forget_after(self, step: int) -> None:
        """Forget the metrics, but for events, of steps after `step`, which are about to be taken
        again. Collective over all ranks; raises UserError on every rank if that fails."""
        action = f"the metrics in {self.path} cannot be taken back to step {step}"
        with shared_fate(action, "Checkpoints are untouched", self._groups.world):
            if self._metrics is not None:
                self._metrics.truncate_after(step)

    def record(self, step: int, kind: Kind, values: Mapping[str, Value]) -> None:
        """Write to the metrics, if the folder is open. Collective over all ranks; raises UserError
        on every rank if it can't be written.

        An evaluation is written once: a finished run that is started again repeats it.
        """
        action = f"the metrics of step {step} cannot be written to {self.path}"
        mend = "Checkpoints are untouched: see that there is room, then start again to resume"
        with shared_fate(action, mend, self._groups.world):
            if self._metrics is not None and (
                kind in ("train", "event") or not self._metrics.has(step, kind)
            ):
                self._metrics.write(step, kind, values)

    def close(self) -> None:
        """Let go of the folder; again if it is done already. Each rank by itself."""
        if self._metrics is not None:
            self._metrics.close()
        self._lock.release()

    @property
    def _unwritable(self) -> tuple[str, str]:
        """What cannot be done, and how to mend it."""
        action = f"the run folder {self.path} cannot be written"
        return action, "Set run_dir to a folder that every rank can write to"
