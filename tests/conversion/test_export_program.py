"""The program that brings checkpoints of runs to transformers, and what it says to mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conversion.hugging_face import load, logits
from tests.conversion.saved_models import save_and_run
from tests.harness import Ranks
from tests.model.cases import random_tokens
from tests.programs import call_program, write_run
from tests.tiny import tiny_config
from uoe_parallel.conversion.program import main
from uoe_parallel.inference.opening import opened

MODEL = {"bias": False}
HALF = "tests.conversion.test_export_program:Half"


class Half:
    """A gate of another package."""

    def __init__(self, config: object, num_experts: int) -> None:
        pass

    def __call__(self, scores_SBE: Tensor, mask_SBE: Tensor) -> Tensor:
        return torch.full_like(scores_SBE, 0.5)


def opened_logits(run: Path, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """On one rank: the logits of a run's newest checkpoint, and those with all experts on."""
    with opened(run, ["parallel.tensor=1"]) as model:
        own = model.logits(tokens_BS)
        with model.model.all_experts():
            return own, model.logits(tokens_BS)


def test_a_trained_run(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_caches: None
) -> None:
    """By two ranks with ZeRO, whose checkpoint holds much beside weights."""
    rule = {"selection": "threshold", "threshold_warmup": 1}
    config = write_run(tmp_path, model=MODEL, feed_forward=rule, parallel={"tensor": 2})
    outcomes = ranks(2).run(call_program, "--config", config)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    run, tokens = tmp_path / "run", random_tokens(tiny_config())
    ((own, dense),) = ranks(1).run(opened_logits, run, tokens)
    assert (own - dense).abs().max() > 0.01
    for command, wanted in (("export", own), ("merge", dense)):
        out = tmp_path / command
        assert main([command, str(run), str(out)]) == 0
        torch.testing.assert_close(logits(load(out), tokens), wanted, rtol=0, atol=1e-5)
        assert f"{out}: step 4, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"model": {"task": "masked_token"}}, "only models that predict the next token"),
        ({"feed_forward": {"gate": HALF}}, f"feed_forward.gate = {HALF} is a rule of another"),
    ],
    ids=["task", "rule"],
)
def test_what_the_exported_code_does_not_have(
    ranks: Ranks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    complaint: str,
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    ranks(1).run(save_and_run, [tiny_config(run_dir=str(run), **sections)])
    assert main(["export", str(run), str(out)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("convert_checkpoint.py: ") and complaint in told
    assert not out.exists()


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("merge", "export"):
        assert main([command, str(tmp_path), str(tmp_path / "out")]) == 2
        assert "holds no whole checkpoint; name a run folder" in capsys.readouterr().err
