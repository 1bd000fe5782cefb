"""A run on a blend with parts of its own corpora for validation: resumed, and held to its data."""

from __future__ import annotations

from pathlib import Path

from tests.harness import Ranks
from tests.programs import call_program, metrics, only_complaint, write_run
from tests.tiny import write_corpus


def test_a_blend_is_resumed_under_another_layout_and_held_to_its_weights(
    ranks: Ranks, tmp_path: Path
) -> None:
    parts = [
        {"prefix": str(write_corpus(tmp_path / name, size, vocab_size=ids)), "weight": weight}
        for name, size, ids, weight in (("a", 1700, 256, 3.0), ("b", 900, 99, 1.0))
    ]
    path = write_run(
        tmp_path,
        data={"train": parts, "validation": [parts[1]], "test": None},
        training={"steps": 4, "micro_batch_size": 1, "min_learning_rate": 0.01},
    )
    halves = [str(tmp_path / "halves"), str(tmp_path / "whole")]
    overrides = ("--config", path, f"run_dir={halves[0]}")
    [outcome] = ranks(1).run(call_program, *overrides, "training.steps=2")
    assert outcome.code == 0, outcome
    outcomes = ranks(2).run(call_program, *overrides)
    assert [o.code for o in outcomes] == [0, 0] and "resuming" in outcomes[0].out, outcomes
    [outcome] = ranks(1).run(call_program, "--config", path, f"run_dir={halves[1]}")
    assert outcome.code == 0, outcome
    resumed, straight = ([r["loss"] for r in metrics(Path(folder))] for folder in halves)
    assert len(resumed) == 4
    assert max(abs(a - b) for a, b in zip(resumed, straight, strict=True)) < 1e-4

    parts[1]["weight"] = 2.0
    message = only_complaint(ranks(2).run(call_program, *overrides, f"data.train={parts}"))
    assert "tokens of data.train and checksums: saved [[0.75, 1700" in message
    assert "now [[0.6, 1700" in message
