"""A small comparison, and a program that stands for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import tiny_config
from uoe_parallel.comparison.settings import ComparisonConfig

TRAINER = """
import json, shutil, sys, time, pathlib, yaml

given = pathlib.Path(sys.argv[sys.argv.index("--config") + 1])
config = yaml.safe_load(given.read_text())
run_dir = pathlib.Path(config["run_dir"])
with (run_dir / "started").open("a") as file:
    file.write("x")
shutil.copy(given, run_dir / "config.yaml")
steps, rate = config["training"]["steps"], config["training"]["learning_rate"]
BEFORE
loss = abs(rate - 0.02) + 1 / steps + config["seed"] / 1000
report = {"step": steps, "loss": loss, "seconds/step": steps / 100, "peak_memory_bytes": 1e6}
with (run_dir / "metrics.jsonl").open("w") as file:
    for kind in ("train", "validation", "test"):
        file.write(json.dumps({"kind": kind, "accuracy": 0.5, **report}) + "\\n")
"""
"""Of Python: a run whose loss can be said in advance. BEFORE stands for what a test has it do."""

DENSE: dict[str, Any] = {
    "feed_forward": {"routed_layers": "none"},
    "attention": {"routed_layers": "none"},
}


def comparison(folder: Path, before: str = "", **fields: Any) -> ComparisonConfig:
    """Of a dense model with a routed one and a dense one of its cost, trained by `TRAINER`."""
    trainer = folder / "trainer.py"
    trainer.write_text(TRAINER.replace("BEFORE", before))
    run = tiny_config(
        seed=1,
        data={"train": "unused", "validation": "unused", "test": "unused"},
        training={"steps": 40, "warmup_steps": 10, "validate_every": 8, "min_learning_rate": 1e-3},
    ).model_dump(mode="json")
    run.pop("run_dir")
    tree: dict[str, Any] = {
        "folder": str(folder / "compared"),
        "seeds": 2,
        "learning_rates": [0.01, 0.02],
        "baselines": ["dense"],
        "launch": ["python", str(trainer)],
        "run": run,
        "contenders": {
            "dense": {"change": DENSE},
            "cheap": {"change": DENSE, "same_flops_as": "routed"},
            "routed": {"about": "half of it", "change": {"attention": DENSE["attention"]}},
        },
    }
    return ComparisonConfig.model_validate({**tree, **fields})


def quiet(text: str) -> None:
    """Says nothing."""
