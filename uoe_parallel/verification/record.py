"""What a finished run left in its folder: reports, weights and gradients of every step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from uoe_parallel.checkpoint import CheckpointReader, folders, open_checkpoint
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError

INITIAL = "initial"
"""Folder, next to that of the checkpoints, with the weights before the first step."""
CLIPPING_EPS = 1e-6
"""Which clipping adds to the norm that it divides by."""

_DEPTH = {
    part: number
    for number, part in enumerate(
        [
            *("embedding", "layers", "final_norm", "head"),
            *("attention_norm", "attention", "feed_forward_norm", "feed_forward"),
            *("router_weight", "experts", "qkv", "fc1", "output", "fc2", "weight", "bias"),
        ]
    )
}


def depth(name: str) -> list[tuple[int, str]]:
    """Orders parameters as a forward pass meets them; names that it doesn't know come last."""
    return [
        (int(part), "") if part.isdecimal() else (_DEPTH.get(part, len(_DEPTH)), part)
        for part in name.split(".")
    ]


@dataclass(frozen=True)
class RoutesSeen:
    """How a run's own routes differed from recorded ones, over all its steps."""

    flipped_tokens: int
    """How many would by themselves have gone elsewhere; a token counts once per routed block."""
    tokens: int
    replayed: bool
    """Whether they followed the record all the same."""


@dataclass
class RunRecord:
    """A run folder with a checkpoint and a report of every step that is compared."""

    folder: Path
    config: RunConfig
    reports: dict[int, dict[str, Any]]
    """Records of training steps in metrics.jsonl."""
    checkpoints: dict[int, CheckpointReader]
    initial: CheckpointReader | None
    parameters: list[str] = field(init=False)
    """In order of depth."""

    def __post_init__(self) -> None:
        keys = self.checkpoints[max(self.checkpoints)].keys()
        names = (key.removesuffix("/weight") for key in keys if key.endswith("/weight"))
        self.parameters = sorted(names, key=depth)

    @classmethod
    def open(cls, folder: Path) -> RunRecord:
        """Raises UserError if the folder is not that of a run with checkpoints, or is damaged."""
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: not a run folder, it has no config.yaml; name a run_dir")
        config = load_config(folder / "config.yaml")
        checkpoints = _checkpoints(folder / "checkpoints")
        if not checkpoints:
            raise UserError(f"{folder}: no checkpoints; run it with checkpoint.every=1")
        initial = _checkpoints(folder / INITIAL).get(0)
        return cls(folder, config, _reports(folder), checkpoints, initial)

    @property
    def identity(self) -> Any:
        """What the trainer says of the run's model and data."""
        return self.checkpoints[max(self.checkpoints)].state.get("identity")

    def clipping(self, step: int) -> float:
        """What clipping multiplied the step's gradients by."""
        limit = self.config.training.gradient_clipping
        if limit == 0:
            return 1.0
        return min(1.0, limit / (self.reports[step]["gradient_norm"] + CLIPPING_EPS))

    def weight(self, step: int, name: str) -> Tensor:
        """After `step`, fp64; in bf16 the fp32 master. Step 0 is before the first."""
        reader = self.initial if step == 0 else self.checkpoints[step]
        assert reader is not None
        master = f"{name}/master"
        key = master if master in reader.keys() else f"{name}/weight"  # noqa: SIM118
        return reader.read(key).double()

    def has_gradients(self, step: int) -> bool:
        """Whether the checkpoints of `step` and of the step before it are there, if it has one."""
        return step in self.checkpoints and (step == 1 or step - 1 in self.checkpoints)

    def gradient(self, step: int, name: str) -> Tensor:
        """Of the batch, as clipping met it, fp64.

        AdamW keeps m_t = b m_{t-1} + (1 - b) g_t of the clipped g_t, which gives g_t back.
        """
        beta = self.config.training.betas[0]
        clipped = self._moment(step, name)
        if step > 1:
            clipped -= beta * self._moment(step - 1, name)
        return clipped / (1 - beta) / self.clipping(step)

    def _moment(self, step: int, name: str) -> Tensor:
        return self.checkpoints[step].read(f"{name}/exp_avg").double()

    def routes(self) -> RoutesSeen | None:
        """None if the run did nothing with recorded routes."""
        seen = [report for report in self.reports.values() if "routes/tokens" in report]
        flipped, tokens = (
            int(sum(report[f"routes/{name}"] for report in seen))
            for name in ("flipped_tokens", "tokens")
        )
        replayed = self.config.routes.replay is not None
        return RoutesSeen(flipped, tokens, replayed) if seen else None


def _checkpoints(root: Path) -> dict[int, CheckpointReader]:
    steps = {folders.step_of(path) for path in folders.list_checkpoints(root)}
    return {step: open_checkpoint(root, step, None) for step in sorted(steps)}


def _reports(folder: Path) -> dict[int, dict[str, Any]]:
    path = folder / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a run_dir that has it") from None
    except ValueError:
        raise UserError(f"{path}: a line is not JSON; bring it back from a copy") from None
    return {record["step"]: record for record in records if record["kind"] == "train"}
