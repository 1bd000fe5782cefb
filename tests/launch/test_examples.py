"""The examples run from beginning to end, in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch.starting import started

WORDS = "the quick brown fox jumps over a lazy dog and walks home in warm evening light"


@pytest.mark.timeout(240)
def test_own_text_becomes_a_model_that_transformers_loads(tmp_path: Path) -> None:
    text, work, output = tmp_path / "a text.txt", tmp_path / "work", tmp_path / "output"
    lines = (WORDS[i % 7 : 20 + i % 31] for i in range(1500))
    text.write_text("\n".join(lines) + "\n")
    small = ("training.steps=3", "training.warmup_steps=1", "training.validate_every=0")
    small += ("model.num_layers=2", "attention.routed_layers=[1]", "model.sequence_length=32")
    variables = {"WORK": str(work), "VOCAB": "300", "BIN": str(Path(sys.executable).parent)}
    command = ("bash", "launch/examples/own_data.sh", text, "--", *small, "checkpoint.every=0")
    with started(*command, output=output, variables=variables) as process:
        assert process.wait(200) == 0, output.read_text()

    told = output.read_text()
    assert told.rstrip().endswith(" s") and "==> reload in transformers: done" in told
    assert "perplexity" in told and "bits/byte" in told.replace("bits per byte", "bits/byte")
    assert (work / "exported" / "modeling_uoe.py").is_file()
    train, held_out = (work / "text" / part / text.name for part in ("train", "held_out"))
    assert train.read_text() + held_out.read_text() == text.read_text()
