"""Models as if they had been opened, and a run that was trained."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from tests.model.cases import build_model, start
from tests.programs import Outcome, call_program, write_run
from tests.tiny import USED_VOCAB_SIZE, tiny_config
from uoe_parallel.data.tokenizer import ByteTokenizer
from uoe_parallel.inference.opening import OpenedModel

TEXT = "It is a truth universally acknowledged,\n that a model  reads d\u00e9j\u00e0 vu."


def open_tiny(dtype: torch.dtype = torch.float64, **sections: Any) -> OpenedModel:
    """A tiny model of random weights on the ranks of this world."""
    config = tiny_config(**sections)
    groups = start(config)
    model = build_model(config, groups, dtype).eval()
    assert model.used_vocab_size == USED_VOCAB_SIZE
    device = next(model.parameters()).device
    return OpenedModel(config, 0, model, ByteTokenizer(), groups, device)


def train(folder: Path, **sections: Any) -> str:
    """A few steps on every rank of this world; the run's folder."""
    outcome = call_program("--config", write_run(folder, **sections))
    assert outcome.code == 0, outcome
    return str(folder / "run")


def call(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Outcome:
    """A program on a rank."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue())
