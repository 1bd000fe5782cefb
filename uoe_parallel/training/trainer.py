"""The training loop: data, steps, validation, checkpoints, reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from uoe_parallel.checkpoint import CheckpointReader, find_checkpoint, save_checkpoint
from uoe_parallel.config.faults import show
from uoe_parallel.config.load import save_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import (
    MicroBatch,
    evaluation_batches,
    step_batches,
    token_range,
)
from uoe_parallel.data.examples import open_examples
from uoe_parallel.data.tokenizer import build_tokenizer, num_model_ids, padded_vocab_size
from uoe_parallel.errors import UserError
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
from uoe_parallel.training.metrics import Kind, MetricsWriter, Value
from uoe_parallel.training.pipeline import build_engine
from uoe_parallel.training.routes import RunRoutes
from uoe_parallel.training.routing_report import RoutingReporter
from uoe_parallel.training.state import capture, restore
from uoe_parallel.training.timers import StepTimer

SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 200
SAMPLE_TEMPERATURE = 0.7
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


FIXED = (
    "feed_forward.num_experts",
    "feed_forward.routed_layers",
    "feed_forward.shared_experts",
    "attention.routed_layers",
    "attention.shared_experts",
    "seed",
    "data.tokenizer",
    "data.reset_at_documents",
    "data.mask_probability",
    "training.global_batch_size",
    "training.precision",
)
"""Fields of the config that a run keeps when it resumes, next to those of the model."""

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


class StepObserver(Protocol):
    """Who looks on while a run trains."""

    def step(self, number: int) -> AbstractContextManager[object]:
        """What is around training step `number`, from 0, on every rank alike."""
        ...


class Trainer:
    """One run, from its config to its last checkpoint. Built and used by every rank alike."""

    def __init__(
        self, config: RunConfig, groups: ParallelGroups, device: Device, console: TrainingConsole
    ) -> None:
        self.config = config
        self.groups = groups
        self.device = device
        self.console = console
        self.run_dir = Path(config.run_dir)
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
        self.metrics: MetricsWriter | None = None
        self.step = 0

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
                result = self.train_step()
                last = self.step == steps
                if last or self.step % self.config.logging.every == 0:
                    self._report(result, routing)
                if not last and _is_due(self.step, training.validate_every):
                    self.evaluate("validation")
                if last or _is_due(self.step, self.config.checkpoint.every):
                    self.save()

    def finish(self) -> RunSummary:
        """The last validation and test, and a sample if the model predicts next tokens. Collective
        over all ranks."""
        evaluations: dict[Split, Evaluation] = {
            split: self.evaluate(split) for split in self.evaluated
        }
        text = self.sample_text() if self.config.model.task == "next_token" else None
        if self.metrics is not None:
            self.metrics.close()
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
                    self.step,
                    seed=self.config.seed,
                    global_batch_size=training.global_batch_size,
                    micro_batch_size=training.micro_batch_size,
                    data_rank=self.groups.data_rank,
                    data_size=self.groups.layout.data,
                )
                self._check_tokens(batches, self.config.data.train)
                batches = [batch.to(self.device.torch_device) for batch in batches]
            with self.routes.step(self.step):
                result = StepResult(*self.engine.step(batches, self.step, self.timer))
        self._check_finite(result)
        self.step += 1
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
        self._check_tokens(batches, self.evaluated[split])
        evaluation = self.engine.evaluate(batches)
        self._record(split, evaluation.values)
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
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "identity": self._identity(),
        }
        folder = save_checkpoint(
            self.checkpoint_dir,
            self.step,
            pieces,
            state,
            self.groups.world,
            self.config.checkpoint.keep,
        )
        self.console.say(f"checkpoint: {folder}")

    @property
    def checkpoint_dir(self) -> Path:
        return self.run_dir / "checkpoints"

    def _open_run(self) -> None:
        """Resume or start: load state, save the config, open the metrics."""
        reader = find_checkpoint(self.checkpoint_dir, self.groups.world)
        if reader is not None:
            with shared_fate("the run cannot be resumed", "See to the data", self.groups.world):
                self._check_resumable(reader)
            restore(self.engine.deepspeed, self.model, self.groups, reader)
            self.step = reader.step
            self.console.say(
                f"resuming from {reader.path}: {self.step} of {self.config.training.steps} steps "
                "are done"
            )
        with shared_fate(
            f"the run folder {self.run_dir} cannot be written",
            "Set run_dir to a folder that every rank can write to",
            self.groups.world,
        ):
            if self.groups.is_main:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                save_config(self.config, self.run_dir / "config.yaml")
                self.metrics = MetricsWriter(self.run_dir, self.config.logging.tensorboard)
                self.metrics.truncate_after(self.step if reader else -1)

    def _identity(self) -> dict[str, Any]:
        """What a run keeps when it resumes, as JSON: its weights and the order of its data."""
        not_of_weights = {"model": {"dropout", "attention_dropout"}}
        config = self.config.model_dump(mode="json", exclude=not_of_weights)
        model = {f"model.{name}": value for name, value in config["model"].items()}
        fields = model | {field: reduce(getitem, field.split("."), config) for field in FIXED}
        kinds = {"feed_forward": self.config.feed_forward, "attention": self.config.attention}
        fields |= {f"levels of {kind}": routing.levels for kind, routing in kinds.items()}
        return fields | {"tokens of data.train and checksums": self.train_data.fingerprint}

    def _check_resumable(self, reader: CheckpointReader) -> None:
        """Refuse a checkpoint of another model or another order of the data."""
        saved: Any = reader.state.get("identity", {})
        changed = [
            f"{field}: saved {show(saved.get(field))}, now {show(now)}"
            for field, now in self._identity().items()
            if saved.get(field) != now
        ]
        if changed:
            raise UserError(
                f"{reader.path} was saved by a run that differs:\n  "
                + "\n  ".join(changed)
                + "\nRestore these fields to continue it, or choose another run_dir"
            )

    def _check_tokens(self, batches: list[MicroBatch], prefix: str) -> None:
        smallest, largest = token_range(batches, self.config.model.task)
        ends = torch.tensor([-smallest, largest], device=self.device.torch_device)
        below, largest = comm.max_over(ends, self.groups.data, purpose=Purpose.TOKEN_RANGE).tolist()
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
        self._record("train", values)
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        self.console.report(self.step, numbers)

    def _record(self, kind: Kind, values: Mapping[str, Value]) -> None:
        """Write to the run's record. Collective over all ranks.

        An evaluation is written once: a finished run that is started again repeats it.
        """
        action = f"the metrics of step {self.step} cannot be written to {self.run_dir}"
        mend = "Checkpoints are untouched: see that there is room, then start again to resume"
        with shared_fate(action, mend, self.groups.world):
            if self.metrics is not None and (
                kind == "train" or not self.metrics.has(self.step, kind)
            ):
                self.metrics.write(self.step, kind, values)

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
