"""What transformers makes of exported checkpoints is what this package computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion.hugging_face import load, logits, transformers
from tests.conversion.saved_models import save_and_run
from tests.harness import Ranks
from tests.model.cases import random_tokens
from tests.model.rules import CAUSAL_RULES
from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.conversion.export_uoe import export

GPT_2 = {"norm": "layer_norm", "positions": "learned", "activation": "gelu_tanh"}


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that comes with a model is copied to where this process imports it from."""
    utilities = transformers().dynamic_module_utils
    monkeypatch.setattr(utilities, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def config_of(folder: Path, rule: str, **sections: Any) -> RunConfig:
    fields = CAUSAL_RULES[rule]
    sections = {"attention": {}, "training": {}, "parallel": {}} | sections
    return tiny_config(
        run_dir=str(folder / "run"),
        model=sections.get("model", {}),
        feed_forward=fields,
        attention=fields | sections["attention"],
        parallel={"zero_stage": 0} | sections["parallel"],
        training={"precision": "fp64"} | sections["training"],
    )


@pytest.mark.parametrize("rule", CAUSAL_RULES)
def test_logits(ranks: Ranks, tmp_path: Path, rule: str) -> None:
    config = config_of(tmp_path, rule, parallel={"tensor": 2})
    expected, _ = ranks(2).run(save_and_run, config)
    export(tmp_path / "run", tmp_path / "out")
    found = logits(load(tmp_path / "out"), random_tokens(config))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
