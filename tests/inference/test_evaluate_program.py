from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.inference.cases import TEXT, call
from tests.programs import Outcome
from uoe_parallel.inference.evaluate_program import main


def evaluate(*arguments: str) -> Outcome:
    return call(main, arguments)


def test_any_layout_reports_the_same_of_a_run(ranks: Ranks, run: str, tmp_path: Path) -> None:
    book, other = tmp_path / "book.txt", tmp_path / "other.txt"
    book.write_text(TEXT)
    other.write_text("Quite another text.")
    results = []
    for layout in ("parallel.tensor=1", "parallel.tensor=2", "parallel.pipeline=2"):
        file = tmp_path / f"{layout}.json"
        world = 1 if layout.endswith("=1") else 2
        others = ["parallel.tensor=1"] if "pipeline" in layout else []
        options = ["--stride", "4", "--json", str(file), layout, *others]
        first, *rest = ranks(world).run(evaluate, run, str(book), str(other), *options)
        assert first.code == 0, first
        assert [outcome.out + outcome.err for outcome in rest] == [""] * (world - 1)
        assert "Step 4, windows of 16 tokens, 4 further each" in first.out
        results.append(json.loads(file.read_text()))
    texts = results[0]["texts"]
    assert list(texts) == [str(book), str(other)]
    assert texts[str(book)]["bytes"] == book.stat().st_size
    total = results[0]["all"]
    assert total["tokens"] == sum(text["tokens"] for text in texts.values())
    assert total["bits_per_byte"] == pytest.approx(total["loss"] / math.log(2))
    for result in results[1:]:
        for name, value in total.items():
            assert result["all"][name] == pytest.approx(value, rel=1e-5), name


def test_mistakes_are_told_once_and_end_with_code_2(ranks: Ranks, run: str, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("d\u00e9j\u00e0 vu".encode("latin-1"))
    cases = {
        (run, str(tmp_path / "missing.txt")): "missing.txt",
        (run, str(latin)): "latin.txt is not UTF-8: invalid continuation byte at byte 1",
        (run, str(latin), "parallel.tensor=3"): "parallel.tensor",
    }
    for arguments, told in cases.items():
        first, second = ranks(2).run(evaluate, *arguments)
        assert (first.code, second.code) == (2, 2)
        assert first.err.startswith("evaluate.py: ") and told in first.err, first
        assert second.err == ""


def test_run_that_is_not_there_is_told(
    ranks: Ranks, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing"), str(tmp_path)]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run"], ["run", "data.split=null"], ["run", "--batch=0"]])
def test_command_without_a_text_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "evaluate.py: error" in capsys.readouterr().err
