"""Train the same short run under every routing rule and compare where they end.

python tools/train_rules.py                    trains what is not trained yet, prints the table
python tools/train_rules.py --only "top-k"     trains some of the rules
python tools/train_rules.py --write            puts the table into docs/routing.md

The corpus is the quickstart's (tools/make_quickstart_corpus.py runs/data/stdlib). Runs lie in
runs/rules, and finished ones are used again. The exit code is 1 if a rule ends above what it
must reach.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uoe_parallel.config.load import load_config
from uoe_parallel.errors import UserError

CONFIG = Path("configs/cpu_rules.yaml")
RUNS = Path("runs/rules")
PAGE = Path(__file__).parent.parent / "docs" / "routing.md"
BEGIN, END = "<!-- trained rules: begin -->\n", "<!-- trained rules: end -->\n"
BELOW = {"next_token": 2.6, "masked_token": 3.0}
"""Nats a token that every rule must reach, by task. Bytes drawn evenly have 5.5."""

NEXT_TOKEN: dict[str, dict[str, Any]] = {
    "dense": {"routed_layers": "none"},
    "top-k": {},
    "top-k, one expert": {"top_k": 1},
    "capacity": {"capacity_factor": 1.0},
    "threshold": {"selection": "threshold"},
    "patches": {"patch_length": 4},
    "patches, threshold": {"patch_length": 4, "selection": "threshold"},
    "segments": {"selection": None, "segment_length": 16, "segment_experts": 4},
    "segments, then top-k": {"segment_length": 16, "segment_experts": 6, "top_k": 3},
    "segments, then threshold": {
        "segment_length": 16,
        "segment_experts": 6,
        "selection": "threshold",
        "top_k": 4,
    },
    "softmax gate": {"gate": "softmax"},
    "softmax of chosen": {"gate": "softmax_of_chosen"},
    "relu gate": {"gate": "relu"},
    "no balance": {"balance": []},
    "batch loss": {"balance": ["batch_loss"]},
    "bias": {"balance": ["bias"]},
    "shared expert": {"shared_experts": 1, "top_k": 3},
    "queries only": {"keys_and_values": "all"},
}
MASKED_TOKEN: dict[str, dict[str, Any]] = {
    "dense": {"routed_layers": "none"},
    "top-k": {},
    "expert choice": {"selection": "expert_choice"},
    "expert choice of patches": {"selection": "expert_choice", "patch_length": 4},
    "threshold": {"selection": "threshold"},
    "segments, then expert choice": {
        "segment_length": 16,
        "segment_experts": 6,
        "selection": "expert_choice",
    },
}
TASKS = {"next_token": NEXT_TOKEN, "masked_token": MASKED_TOKEN}


@dataclass(frozen=True)
class Result:
    task: str
    rule: str
    fields: dict[str, Any]
    loss: float
    """Of validation, nats a token."""
    last: dict[str, Any]
    """The last report of training."""


def folder_of(task: str, rule: str) -> Path:
    return RUNS / task / rule.replace(", ", "_").replace(" ", "_")


def changes_of(task: str, rule: str, fields: dict[str, Any]) -> list[str]:
    """What a rule's run overrides in the config."""
    folder = folder_of(task, rule)
    settings = {"run_dir": str(folder), "model.task": task}
    for kind in ("feed_forward", "attention"):
        own = {k: v for k, v in fields.items() if k != "keys_and_values" or kind == "attention"}
        settings |= {f"{kind}.{name}": value for name, value in own.items()}
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def train(task: str, rule: str, fields: dict[str, Any], overrides: list[str]) -> Result:
    """Train one rule in a process of its own, or find it trained. Raises CalledProcessError."""
    folder, changes = folder_of(task, rule), changes_of(task, rule, fields)
    metrics = folder / "metrics.jsonl"
    command = [sys.executable, "-m", "uoe_parallel.pretrain", "--config", str(CONFIG)]
    print(f"==> {task}: {rule}", file=sys.stderr, flush=True)
    if not _is_finished(folder, [*changes, *overrides]):
        subprocess.run([*command, *changes, *overrides], check=True, stdout=subprocess.DEVNULL)
    loss = _records(metrics, "validation")[-1]["loss"]
    return Result(task, rule, fields, loss, _records(metrics, "train")[-1])


def _is_finished(folder: Path, changes: list[str]) -> bool:
    """Whether a run with the same config got to its last step."""
    try:
        config = load_config(folder / "config.yaml")
        validated = _records(folder / "metrics.jsonl", "validation")
    except (UserError, OSError):
        return False
    steps = config.training.steps
    return config == load_config(CONFIG, changes) and any(r["step"] == steps for r in validated)


def _records(metrics: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def table(results: list[Result]) -> str:
    """In Markdown."""
    lines = [
        "| task | rule | fields of both blocks | loss | busiest expert | dropped |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        fields = ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in result.fields.items())
        load = result.last.get("load_max_over_mean")
        shares = [v for k, v in result.last.items() if k.startswith("dropped_share/")]
        dropped = f"{sum(shares) / len(shares):.1%}" if shares and any(shares) else ""
        busiest = "" if load is None else f"{load:.2f}"
        cells = [result.task, result.rule, fields, f"{result.loss:.3f}", busiest, dropped]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written(page: str, results: list[Result]) -> str:
    """The page with this table."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table(results)}{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="RULE", help="train this rule")
    parser.add_argument("--write", action="store_true", help="put the table into docs/routing.md")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args(arguments)
    if options.write and (options.only or options.overrides):
        parser.error("--write puts down the runs of all rules as they are in the config")
    known = {rule for rules in TASKS.values() for rule in rules}
    if unknown := set(options.only or []) - known:
        parser.error(f"unknown rule {min(unknown)!r}; there are {', '.join(sorted(known))}")
    results = [
        train(task, rule, fields, options.overrides)
        for task, rules in TASKS.items()
        for rule, fields in rules.items()
        if options.only is None or rule in options.only
    ]
    print(table(results), end="")
    above = [r for r in results if r.loss >= BELOW[r.task]]
    for result in above:
        print(f"{result.task}, {result.rule}: {result.loss:.3f} is not below {BELOW[result.task]}")
    if options.write and not above:
        PAGE.write_text(written(PAGE.read_text(), results))
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
