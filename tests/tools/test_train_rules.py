"""The runs of tools/train_rules.py are ones that the config allows, and finished ones are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import train_rules
from tools.train_rules import TASKS, Result, changes_of, folder_of, main, table, written
from uoe_parallel.config.load import load_config, save_config

ROOT = Path(__file__).parent.parent.parent
RULES = [(task, rule) for task, rules in TASKS.items() for rule in rules]


@pytest.mark.parametrize(("task", "rule"), RULES)
def test_every_rule_is_a_config_without_faults(task: str, rule: str) -> None:
    changes = changes_of(task, rule, TASKS[task][rule])
    config = load_config(ROOT / train_rules.CONFIG, changes)
    assert config.model.task == task
    assert bool(config.routed_blocks) == (rule != "dense")


def test_folders_differ() -> None:
    assert len({folder_of(task, rule) for task, rule in RULES}) == len(RULES)


def test_only_a_run_of_this_config_that_got_to_its_end_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_rules, "CONFIG", ROOT / train_rules.CONFIG)
    config = load_config(train_rules.CONFIG)

    def finished(steps: int, *changes: str) -> bool:
        save_config(config, tmp_path / "config.yaml")
        line = {"step": steps, "kind": "validation", "loss": 2.0}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return train_rules._is_finished(tmp_path, list(changes))

    assert finished(config.training.steps)
    assert not finished(config.training.steps - 1)
    assert not finished(config.training.steps, "feed_forward.top_k=1")
    assert not train_rules._is_finished(tmp_path / "nowhere", [])


def test_the_table_takes_the_place_of_the_old_one() -> None:
    last = {"load_max_over_mean": 1.5, "dropped_share/a": 0.1, "dropped_share/b": 0.3}
    results = [Result("next_token", "capacity", {"capacity_factor": 1.0}, 2.25, last)]
    row = "| next_token | capacity | `capacity_factor: 1.0` | 2.250 | 1.50 | 20.0% |"
    assert row in table(results)
    page = f"before\n{train_rules.BEGIN}old\n{train_rules.END}after\n"
    new = written(page, results)
    assert new.startswith("before\n") and new.endswith("after\n")
    assert row in new and "old" not in new


@pytest.mark.parametrize("also", [["--only", "bias"], ["training.steps=2"]])
def test_the_page_is_not_written_from_a_part(also: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--write", *also])
