from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.inference.cases import call
from tests.programs import Outcome
from uoe_parallel.inference.generate_program import main
from uoe_parallel.inference.terminal import harmless


def write(*arguments: str) -> Outcome:
    return call(main, arguments)


def test_texts_are_shown_by_rank_0_and_kept(ranks: Ranks, run: str, tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "texts.json"
    prompts.write_text("first\r\n\nthe second\n")
    options = ["--prompts", str(prompts), "--tokens", "20", "--samples", "2", "--seed", "5"]
    first, second = ranks(2).run(
        write, run, "--prompt", "zero\x1b", *options, "--json", str(file), "parallel.tensor=2"
    )
    assert (first.code, second.code) == (0, 0), first
    assert second.out == second.err == ""
    texts = json.loads(file.read_text())["texts"]
    assert [text["prompt"] for text in texts] == [
        *["zero\x1b"] * 2,
        *["first"] * 2,
        *["the second"] * 2,
    ]
    assert [text["seed"] for text in texts] == [5, 6] * 3
    shown = [
        f"--- {number} of 6\n{harmless(text['prompt'] + text['text'])}\n"
        for number, text in enumerate(texts, 1)
    ]
    assert first.out == "\n".join(shown)
    [streamed] = ranks(1).run(
        write, run, "--prompt", "zero\x1b", *options, "--stream", "parallel.tensor=1"
    )
    assert streamed.out == first.out


def test_one_text_is_shown_by_itself(ranks: Ranks, run: str) -> None:
    options = ["--prompt", "alone", "--tokens", "3", "--temperature", "0", "parallel.tensor=1"]
    [outcome] = ranks(1).run(write, run, *options)
    assert outcome.code == 0
    assert outcome.out.startswith("alone") and outcome.out.endswith("\n")


def test_file_without_a_prompt_is_told(ranks: Ranks, run: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    first, second = ranks(2).run(write, run, "--prompts", str(empty))
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert first.err == (f"generate.py: --prompts: {empty} has no prompt; write one on each line\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--prompt", "a", "--tokens", "0"],
        ["run", "--prompt", "a", "--temperature", "-1"],
        ["run", "--prompt", "a", "--top-p", "0"],
    ],
)
def test_command_that_means_nothing_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "generate.py: error" in capsys.readouterr().err
