"""The training loop: data, steps, validation, checkpoints, reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import Signals

import torch

from uoe_parallel.checkpoint import CheckpointReader, find_checkpoint
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import (
    MicroBatch,
    evaluation_batches,
    step_batches,
    token_range,
)
from uoe_parallel.data.corpora import EvaluationSplit, open_run_data
from uoe_parallel.data.tokenizer import build_tokenizer, num_model_ids, padded_vocab_size
from uoe_parallel.errors import Interrupted, UserError
from uoe_parallel.experts.backends import pick_backend
from uoe_parallel.inference.same_tokenizer import STATE_KEY, check_tokenizer
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.model.norm import choose_norm
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.device import DTYPES, Device
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.parallel.random import seed_streams
from uoe_parallel.parallel.sharding import is_owner, named_shards
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.engine import StepResult
from uoe_parallel.training.evaluation import Evaluation, loss_of_text
from uoe_parallel.training.generation import sample_text
from uoe_parallel.training.identity import check_resumable, run_identity
from uoe_parallel.training.interruption import Interruption
from uoe_parallel.training.metrics import Value
from uoe_parallel.training.observer import StepObserver
from uoe_parallel.training.origin import start_from
from uoe_parallel.training.pipeline import build_engine
from uoe_parallel.training.progress import Progress
from uoe_parallel.training.recovery import Recovery
from uoe_parallel.training.routes import RunRoutes
from uoe_parallel.training.routing_report import RoutingReporter
from uoe_parallel.training.run_folder import RunFolder
from uoe_parallel.training.saving import Saver
from uoe_parallel.training.state import capture, restore
from uoe_parallel.training.timers import StepTimer


@dataclass(frozen=True)
class RunSummary:
    """What a finished run ends with."""

    evaluations: dict[EvaluationSplit, Evaluation]
    """Of each split that the config has data for."""
    text: str | None
    """Sampled from the model, if it predicts next tokens."""


class Trainer:
    """One run, from its config to its last checkpoint. Built and used by every rank alike."""

    def __init__(
        self,
        config: RunConfig,
        groups: ParallelGroups,
        device: Device,
        console: TrainingConsole,
        interruption: Interruption | None = None,
    ) -> None:
        """interruption: whose signals end training. None hears of none."""
        self.config = config
        self.groups = groups
        self.device = device
        self.console = console
        self.folder = RunFolder(config, groups)
        self.saver = Saver(self.folder.checkpoints, config.checkpoint, groups, console.say)
        self.progress = Progress()
        self._saved_step = 0
        """Whose state is in a checkpoint, or is that of a run that has not begun."""
        self._interruption = interruption or Interruption()
        torch.manual_seed(config.seed)
        seed_streams(config.seed, groups)
        with shared_fate("the data cannot be read", "See to the named file", groups.world):
            self.tokenizer = build_tokenizer(config.data.tokenizer)
            self.data = open_run_data(config, self.tokenizer)
        precision = DTYPES[config.training.precision]
        backend, self.products = pick_backend(
            device.torch_device, precision, config.training.expert_products, groups.world
        )
        num_ids = num_model_ids(self.tokenizer, config.model.task)
        self.model = LanguageModel(
            config,
            groups,
            vocab_size=padded_vocab_size(num_ids, config.model.vocab_multiple),
            used_vocab_size=num_ids,
            backend=backend,
            # DeepSpeed rounds the model to bf16 itself, and makes masters of what is left.
            dtype=torch.promote_types(precision, torch.float32),
        )
        self.engine = build_engine(self.model, config, groups, device.torch_device)
        self.num_parameters = self._count_parameters()
        _, norm = choose_norm(config.model.norm, device.torch_device.type)
        self.picks = f"{norm}, {self.engine.optimizer_name}"
        blocks = self.model.routed_blocks()
        self.routes = RunRoutes(config, groups, blocks, device.torch_device)
        self.routing = RoutingReporter(blocks, config, groups, device.torch_device)
        self.timer = StepTimer(device.synchronize)
        self.recovery = Recovery(self, self._restore)
        self.observers: Sequence[StepObserver] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that are behind."""
        return self.progress.step

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.model.sequence_length

    def train(self) -> None:
        """Train to the last step, from the newest checkpoint of the run folder if there is one.

        Raises Interrupted on every rank, with a checkpoint of the last step taken, once a signal
        has asked one of them to leave.
        """
        self._open_run()
        training, steps = self.config.training, self.config.training.steps
        with (
            self.saver,
            self._saved_if_interrupted(),
            self.console.progress(steps, start=self.step),
        ):
            self._leave_if_asked()
            if self.step == 0 and training.validate_every > 0:
                self.evaluate("validation")
            while self.step < steps:
                result = self.train_step()
                if result.anomaly is not None and result.anomaly.action == "roll_back":
                    self.recovery.roll_back(result.anomaly)
                    continue
                last = self.step == steps
                reports = last or self.step % self.config.logging.every == 0
                if reports and result.anomaly is None:
                    self._report(result)
                if not last and _is_due(self.step, training.validate_every):
                    self.evaluate("validation")
                if last or _is_due(self.step, self.config.checkpoint.every):
                    self.save()
                elif _is_due(self.step, self.config.replicas.check_every):
                    self.recovery.replicas_agree()

    def finish(self) -> RunSummary:
        """The last validation and test, and a sample if the model predicts next tokens. Collective
        over all ranks. Raises Interrupted on all of them as `train` does."""
        evaluations: dict[EvaluationSplit, Evaluation] = {}
        with self._saved_if_interrupted():
            for split in self.data.evaluation:
                self._leave_if_asked()
                evaluations[split] = self.evaluate(split)
            self._leave_if_asked()
        text = None
        if self.config.model.task == "next_token":
            text = sample_text(self.engine, self.tokenizer)
        self.folder.close()
        return RunSummary(evaluations, text)

    def train_step(self) -> StepResult:
        """Take one optimizer step, or skip it for an anomaly; `step` counts it.

        Raises UserError on every rank for a token beyond the vocabulary and for an anomaly that
        ends the run. To roll back is left to the caller.
        """
        training = self.config.training
        with ExitStack() as around:
            for observer in self.observers:
                around.enter_context(observer.step(self.step))
            around.enter_context(
                self.timer.step(parts=not self.device.is_cuda or self._logs_next_step())
            )
            with self.timer.part("data"):
                batches = step_batches(
                    self.data.train,
                    self.progress.batch,
                    seed=self.config.seed,
                    global_batch_size=training.global_batch_size,
                    micro_batch_size=training.micro_batch_size,
                    data_rank=self.groups.data_rank,
                    data_size=self.groups.layout.data,
                )
                self._agree_on_step(batches)
                batches = [batch.to(self.device.torch_device) for batch in batches]
            with self.routes.step(self.step):
                result = self.engine.step(batches, self.step, self.timer)
        if result.anomaly is not None:
            self.recovery.tell(result, result.anomaly)
        self.progress.step += 1
        self.progress.batch += 1
        self.progress.updates += result.anomaly is None
        return result

    def evaluate(self, split: EvaluationSplit) -> Evaluation:
        """On a split that the config has data for, reported."""
        batches = list(
            evaluation_batches(
                self.data.evaluation[split],
                self.config.training.validation_sequences,
                micro_batch_size=self.config.training.micro_batch_size,
                data_rank=self.groups.data_rank,
                data_size=self.groups.layout.data,
            )
        )
        smallest, largest = token_range(batches, self.config.model.task)
        below, largest = self._greatest(-smallest, largest, purpose=Purpose.TOKEN_RANGE)
        self._check_tokens(below, largest, self.data.sources[split])
        evaluation = self.engine.evaluate(batches)
        self.folder.record(self.step, split, evaluation.values)
        self.console.say(f"{split}: loss {evaluation.describe()} after step {self.step}")
        return evaluation

    def save(self) -> None:
        """Write a checkpoint of the current step, unless replicas differ and the run has gone back
        to the one before. Collective over all ranks."""
        self.folder.confirm()
        if not self.recovery.replicas_agree():
            return
        captured = partial(
            capture,
            self.engine.deepspeed,
            self.model,
            self.groups,
            masters=self.config.training.precision == "bf16",
        )
        state = {
            "config": self.config.model_dump(mode="json"),
            "progress": self.progress.as_state(),
            "guard": self.engine.guard.as_state(),
            STATE_KEY: self.tokenizer.fingerprint,
            "identity": run_identity(self.config, self.data.train.fingerprint),
        }
        self.saver.save(self.step, captured, state)
        self._saved_step = self.step

    def _open_run(self) -> None:
        """Resume or start: load state, save the config, open the metrics."""
        self.folder.lock()
        reader = find_checkpoint(self.folder.checkpoints, self.groups.world)
        if reader is not None:
            with shared_fate("the run cannot be resumed", "See to the data", self.groups.world):
                check_tokenizer(reader, self.config.data.tokenizer, self.tokenizer)
                check_resumable(reader, run_identity(self.config, self.data.train.fingerprint))
            self._restore(reader)
            self.console.say(
                f"resuming from {reader.path}: {self.step} of {self.config.training.steps} steps "
                "are done"
            )
        elif self.config.checkpoint.start_from is not None:
            origin = Path(self.config.checkpoint.start_from)
            self.console.say(start_from(origin, self.engine, self.tokenizer))
        self.folder.open(self.step if reader else None)

    def _restore(self, reader: CheckpointReader) -> None:
        self.progress = Progress.of(reader.state["progress"])
        self._saved_step = self.step
        self.engine.guard.restore(reader.state["guard"])
        restore(self.engine.deepspeed, self.model, self.groups, reader, self.progress.updates)
        # What is reported next is of steps from here on.
        self.timer.take()
        self.routes.forget()
        self.routing.forget()

    def _agree_on_step(self, batches: list[MicroBatch]) -> None:
        """What has to hold on all ranks before one of them begins a step, in one message.

        Raises UserError on every rank for a token beyond the vocabulary or a checkpoint that could
        not be written, and Interrupted if one of them was asked to leave.
        """
        smallest, largest = token_range(batches, self.config.model.task)
        signal, failed = self._interruption.signal, int(self.saver.has_failed)
        below, largest, signal, failed = self._greatest(
            -smallest, largest, signal, failed, purpose=Purpose.STEP_AGREEMENT
        )
        self._check_tokens(below, largest, self.data.sources["train"])
        if failed:
            self.saver.finish()
        if signal:
            raise Interrupted(signal)

    def _leave_if_asked(self) -> None:
        """Raise Interrupted on every rank if one of them was asked to leave. Collective."""
        [signal] = self._greatest(self._interruption.signal, purpose=Purpose.AGREEMENT)
        if signal:
            raise Interrupted(signal)

    @contextmanager
    def _saved_if_interrupted(self) -> Iterator[None]:
        """A block that every rank leaves by Interrupted with a checkpoint of the current step."""
        try:
            yield
        except Interrupted as asked:
            if self.step != self._saved_step:
                self.save()
            self.saver.finish()
            saved = "checkpoint saved" if self.step > 0 else "nothing to save"
            self.console.say(
                f"asked to leave by {Signals(asked.signal).name} after step {self.step}: {saved}, "
                "the same command continues"
            )
            raise

    def _greatest(self, *values: int, purpose: Purpose) -> list[int]:
        """Each value's maximum over all ranks. Collective over them."""
        own = torch.tensor(values, device=self.device.torch_device)
        return comm.max_over(own, self.groups.world, purpose=purpose).tolist()

    def _check_tokens(self, below: int, largest: int, source: str) -> None:
        """`below`: minus the smallest id."""
        if largest >= self.tokenizer.size or below > 0:
            wrong = -below if below > 0 else largest
            raise UserError(
                f"{source}: token id {wrong} is not one of the {self.tokenizer.size} ids of "
                f"data.tokenizer={self.config.data.tokenizer}; preprocess the text with this "
                "tokenizer or name the one it was made with"
            )

    def _report(self, result: StepResult) -> None:
        seconds = self.timer.take()
        memory = torch.tensor(float(self.device.peak_memory()), device=self.device.torch_device)
        memory = float(comm.max_over(memory, self.groups.world, purpose=Purpose.REPORT))
        values: dict[str, Value] = {
            "loss": result.loss,
            **loss_of_text(self.config, result.loss),
            "gradient_norm": result.gradient_norm,
            **result.distillation,
            "learning_rate": result.learning_rate,
            "tokens_per_second": self.tokens_per_step / seconds["step"],
            "tokens": float(self.step * self.tokens_per_step),
            "eta_seconds": seconds["step"] * (self.config.training.steps - self.step),
            "peak_memory_bytes": memory,
            **{f"seconds/{part}": value for part, value in seconds.items()},
            **self.routing.report(),
            **self.routes.report(),
        }
        if (stalled := self.saver.take_stall()) is not None:
            values["seconds/checkpoint"] = stalled
        self.folder.record(self.step, "train", values)
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        self.console.report(self.step, numbers)

    def _logs_next_step(self) -> bool:
        return (self.step + 1) % self.config.logging.every == 0

    def _count_parameters(self) -> int:
        """Elements of the full model."""
        owned = (
            math.prod(shard.shape)
            for _, param, shard in named_shards(self.model, self.groups)
            if is_owner(param, self.groups)
        )
        local = torch.tensor(sum(owned), device=self.device.torch_device)
        return int(comm.sum_over(local, self.groups.world, purpose=Purpose.SETUP))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
