"""What the pages show is what runs."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.harness import Ranks
from tests.programs import call_program, metrics, write_run

ROUTING = Path(__file__).parent.parent / "docs" / "routing.md"


def code_block(page: str, language: str) -> str:
    [block] = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return block


def test_the_rules_of_the_routing_page_train(ranks: Ranks, tmp_path: Path) -> None:
    page = ROUTING.read_text()
    (tmp_path / "my_rules.py").write_text(code_block(page, "python"))
    changes = yaml.safe_load(code_block(page, "yaml"))
    config = write_run(tmp_path, parallel={"tensor": 2}, **changes)
    first, second = ranks(2).run(call_program_with, str(tmp_path), str(config))
    assert (first, second) == (0, 0)
    reports = metrics(tmp_path / "run")
    assert reports
    for report in reports:
        assert report["balance_loss/layers.0.feed_forward"] >= 1
        assert 0 < report["load_entropy/layers.1.feed_forward"] <= 1


def call_program_with(folder: str, config: str) -> int:
    """With the modules of `folder`."""
    import sys

    sys.path.insert(0, folder)
    try:
        return call_program("--config", config).code
    finally:
        sys.path.remove(folder)
        sys.modules.pop("my_rules", None)
