"""The table of docs/parallelism.md is what the rules say."""

from __future__ import annotations

from tools.supported_mixes import PAGE, page_with, table


def test_the_page_has_the_table_of_the_rules() -> None:
    assert PAGE.read_text(encoding="utf-8") == page_with(table()), (
        "run python tools/supported_mixes.py --write"
    )


def test_the_table_knows_what_is_refused() -> None:
    rows = {line.split(" | ")[0]: line for line in table().splitlines()}
    assert rows["| tp2-sp-dp2"].count("yes") == 4
    assert rows["| pp2-dp2"].count("yes") == 2 and "no (" in rows["| pp2-dp2"]
    assert "yes" not in rows["| tp2-dp2-ep4"]
