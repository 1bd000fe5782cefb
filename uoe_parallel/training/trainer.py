"""The training loop: data, steps, validation, checkpoints, reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch

from uoe_parallel.checkpoint import CheckpointReader, find_checkpoint
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import (
    MicroBatch,
    evaluation_batches,
    step_batches,
    token_range,
)
from uoe_parallel.data.examples import open_examples
from uoe_parallel.data.tokenizer import build_tokenizer, num_model_ids, padded_vocab_size
from uoe_parallel.errors import Interrupted, UserError
from uoe_parallel.experts.backends import pick_backend
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.model.norm import choose_rms_norm
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.parallel.random import seed_streams
from uoe_parallel.parallel.sharding import is_owner, named_shards
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.engine import DTYPES
from uoe_parallel.training.evaluation import Evaluation, loss_of_text
from uoe_parallel.training.generation import sample
from uoe_parallel.training.identity import check_resumable, run_identity
from uoe_parallel.training.interruption import Interruption
from uoe_parallel.training.metrics import Value
from uoe_parallel.training.observer import StepObserver
from uoe_parallel.training.pipeline import build_engine
from uoe_parallel.training.progress import Progress
from uoe_parallel.training.routes import RunRoutes
from uoe_parallel.training.routing_report import RoutingReporter
from uoe_parallel.training.run_folder import RunFolder
from uoe_parallel.training.saving import Saver
from uoe_parallel.training.state import capture, restore
from uoe_parallel.training.timers import StepTimer

SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 200
SAMPLE_TEMPERATURE = 0.7
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


Split = Literal["validation", "test"]


@dataclass(frozen=True)
class RunSummary:
    """What a finished run ends with."""

    evaluations: dict[Split, Evaluation]
    """Of each split that the config has data for."""
    text: str | None
    """Sampled from the model, if it predicts next tokens."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    loss: float
    gradient_norm: float
    learning_rate: float


class Trainer:
    """One run, from its config to its last checkpoint. Built and used by every rank alike."""

    def __init__(
        self, config: RunConfig, groups: ParallelGroups, device: Device, console: TrainingConsole
    ) -> None:
        self.config = config
        self.groups = groups
        self.device = device
        self.console = console
        self.folder = RunFolder(config, groups)
        self.saver = Saver(self.folder.checkpoints, config.checkpoint, groups)
        self.progress = Progress()
        self.interruption = Interruption()
        torch.manual_seed(config.seed)
        seed_streams(config.seed, groups)
        self.tokenizer = build_tokenizer(config.data.tokenizer)
        evaluated: dict[Split, str | None] = {
            "validation": config.data.validation,
            "test": config.data.test,
        }
        self.evaluated: dict[Split, str] = {
            split: prefix for split, prefix in evaluated.items() if prefix is not None
        }
        """Where the data of each split is."""
        with shared_fate("the corpora cannot be read", "See to the named file", groups.world):
            self.train_data = open_examples(config.data.train, config, self.tokenizer)
            self.evaluation_data = {
                split: open_examples(prefix, config, self.tokenizer)
                for split, prefix in self.evaluated.items()
            }
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
        _, norm = choose_rms_norm(device.torch_device.type)
        self.picks = f"{norm}, {self.engine.optimizer_name}"
        self.routes = RunRoutes(config, groups, self.model.routed_blocks(), device.torch_device)
        self.timer = StepTimer(device.synchronize)
        self.observers: Sequence[StepObserver] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that are behind."""
        return self.progress.step

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.model.sequence_length

    def train(self) -> None:
        """Train to the last step, from the newest checkpoint of the run folder if there is one."""
        self._open_run()
        routing = RoutingReporter(
            self.model.routed_blocks(), self.config, self.groups, self.device.torch_device
        )
        training, steps = self.config.training, self.config.training.steps
        if self.step == 0 and training.validate_every > 0:
            self.evaluate("validation")
        with self.console.progress(steps, start=self.step):
            while self.step < steps:
                try:
                    result = self.train_step()
                except Interrupted:
                    self.save()
                    raise
                last = self.step == steps
                if last or self.step % self.config.logging.every == 0:
                    self._report(result, routing)
                if not last and _is_due(self.step, training.validate_every):
                    self.evaluate("validation")
                if last or _is_due(self.step, self.config.checkpoint.every):
                    self.save()
        self.saver.finish()

    def finish(self) -> RunSummary:
        """The last validation and test, and a sample if the model predicts next tokens. Collective
        over all ranks."""
        evaluations: dict[Split, Evaluation] = {
            split: self.evaluate(split) for split in self.evaluated
        }
        text = self.sample_text() if self.config.model.task == "next_token" else None
        self.folder.close()
        return RunSummary(evaluations, text)

    def train_step(self) -> StepResult:
        """Take one optimizer step; `step` counts it.

        Raises UserError on every rank for a token beyond the vocabulary and for a loss or a
        gradient that is not finite.
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
                    self.train_data,
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
                result = StepResult(*self.engine.step(batches, self.step, self.timer))
        self._check_finite(result)
        self.progress.step += 1
        self.progress.batch += 1
        self.progress.updates += 1
        return result

    def evaluate(self, split: Split) -> Evaluation:
        """On a split that the config has data for, reported."""
        batches = list(
            evaluation_batches(
                self.evaluation_data[split],
                self.config.training.validation_sequences,
                micro_batch_size=self.config.training.micro_batch_size,
                data_rank=self.groups.data_rank,
                data_size=self.groups.layout.data,
            )
        )
        smallest, largest = token_range(batches, self.config.model.task)
        below, largest = self._greatest(-smallest, largest, purpose=Purpose.TOKEN_RANGE)
        self._check_tokens(below, largest, self.evaluated[split])
        evaluation = self.engine.evaluate(batches)
        self.folder.record(self.step, split, evaluation.values)
        self.console.say(f"{split}: loss {evaluation.describe()} after step {self.step}")
        return evaluation

    def sample_text(self) -> str:
        """A continuation of a short prompt. Every rank takes part and gets the same text."""
        # The end of another document comes before the text, unless documents don't see each other.
        before = [] if self.config.data.reset_at_documents else [self.tokenizer.eod]
        self.engine.deepspeed.eval()
        with self.model.replicated_tokens():
            ids = sample(
                self.engine.logits,
                [*before, *self.tokenizer.encode(SAMPLE_PROMPT).tolist()],
                by_token=self.model.decodes_by_token,
                # What another document begins with, nothing has been trained to say.
                stop=self.tokenizer.eod if self.config.data.reset_at_documents else None,
                num_tokens=SAMPLE_TOKENS,
                context=self.config.model.sequence_length,
                temperature=SAMPLE_TEMPERATURE,
                seed=self.config.seed,
                device=self.device.torch_device,
            )
        self.engine.deepspeed.train()
        text = SAMPLE_PROMPT + self.tokenizer.decode(ids)
        # A terminal must not obey what a young model says.
        return "".join(c if c.isprintable() or c == "\n" else REPLACEMENT for c in text)

    def save(self) -> None:
        """Write a checkpoint of the current step. Collective over all ranks."""
        pieces = capture(
            self.engine.deepspeed,
            self.model,
            self.groups,
            masters=self.config.training.precision == "bf16",
        )
        state = {
            "progress": self.progress.as_state(),
            "identity": run_identity(self.config, self.train_data.fingerprint),
        }
        folder = self.saver.save(self.step, pieces, state)
        self.console.say(f"checkpoint: {folder}")

    def _open_run(self) -> None:
        """Resume or start: load state, save the config, open the metrics."""
        reader = find_checkpoint(self.folder.checkpoints, self.groups.world)
        if reader is not None:
            with shared_fate("the run cannot be resumed", "See to the data", self.groups.world):
                check_resumable(reader, run_identity(self.config, self.train_data.fingerprint))
            self._restore(reader)
            self.console.say(
                f"resuming from {reader.path}: {self.step} of {self.config.training.steps} steps "
                "are done"
            )
        self.folder.open(self.step if reader else None)

    def _restore(self, reader: CheckpointReader) -> None:
        self.progress = Progress.of(reader.state["progress"])
        restore(self.engine.deepspeed, self.model, self.groups, reader, self.progress.updates)

    def _agree_on_step(self, batches: list[MicroBatch]) -> None:
        """What has to hold on all ranks before one of them begins a step, in one message.

        Raises UserError on every rank for a token beyond the vocabulary or a checkpoint that could
        not be written, and Interrupted if one of them was asked to leave.
        """
        smallest, largest = token_range(batches, self.config.model.task)
        signal, failed = self.interruption.signal, int(self.saver.has_failed)
        below, largest, signal, failed = self._greatest(
            -smallest, largest, signal, failed, purpose=Purpose.STEP_AGREEMENT
        )
        self._check_tokens(below, largest, self.config.data.train)
        if failed:
            self.saver.finish()
        if signal:
            raise Interrupted(signal)

    def _greatest(self, *values: int, purpose: Purpose) -> list[int]:
        """Each value's maximum over all ranks. Collective over them."""
        own = torch.tensor(values, device=self.device.torch_device)
        return comm.max_over(own, self.groups.world, purpose=purpose).tolist()

    def _check_tokens(self, below: int, largest: int, prefix: str) -> None:
        """`below`: minus the smallest id."""
        if largest >= self.tokenizer.size or below > 0:
            wrong = -below if below > 0 else largest
            raise UserError(
                f"{prefix}: token id {wrong} is not one of the {self.tokenizer.size} ids of "
                f"data.tokenizer={self.config.data.tokenizer}; preprocess the text with this "
                "tokenizer or name the one it was made with"
            )

    def _check_finite(self, result: StepResult) -> None:
        """End the run before a loss or a gradient that is not finite can reach a checkpoint."""
        for name, value in (("loss", result.loss), ("gradient norm", result.gradient_norm)):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} of step {self.step + 1} is {value}, and training stopped. "
                    "Checkpoints in the run folder are untouched: lower training.learning_rate "
                    f"({self.config.training.learning_rate}) or raise training.warmup_steps "
                    f"({self.config.training.warmup_steps}), and start again to continue from "
                    "the newest one"
                )

    def _report(self, result: StepResult, routing: RoutingReporter) -> None:
        seconds = self.timer.take()
        memory = torch.tensor(float(self.device.peak_memory()), device=self.device.torch_device)
        memory = float(comm.max_over(memory, self.groups.world, purpose=Purpose.REPORT))
        values: dict[str, Value] = {
            "loss": result.loss,
            **loss_of_text(self.config.model.task, result.loss),
            "gradient_norm": result.gradient_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": self.tokens_per_step / seconds["step"],
            "tokens": float(self.step * self.tokens_per_step),
            "eta_seconds": seconds["step"] * (self.config.training.steps - self.step),
            "peak_memory_bytes": memory,
            **{f"seconds/{part}": value for part, value in seconds.items()},
            **routing.report(),
            **self.routes.report(),
        }
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
