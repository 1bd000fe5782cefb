"""What the program prints and returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from uoe_parallel.preprocessing.program import main


def test_the_tables_tell_of_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, prefix = tmp_path / "a.jsonl", tmp_path / "corpus"
    source.write_text('{"body": "[red]one"}\n{}\n{\n{"body": "two"}')
    options = ["--field=body", "--workers=1", "--bad-lines=skip", "--show-bad-lines=1"]
    assert main([str(source), f"--output={prefix}", *options]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(str(source)))
    assert row.split()[1:] == ["1", "2", "13", "11", "1.1818", "2"]
    assert "2 bad lines are left out" in printed
    assert f"  {source}:2: no field 'body'" in printed
    assert f"{source}:3" not in printed
    assert "bytes (bytes)" in printed


def test_mistakes_are_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("{}")
    command = [str(source), f"--output={tmp_path / 'corpus'}", "--workers=1"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"preprocess_data.py: {source}:1: no field 'text'; mend it, or leave such lines out with "
        "--bad-lines skip\n"
    )
    assert main([*command, "--separator=a\nb"]) == 2
    assert main([*command, "--tokenizer=words"]) == 2
    for option in ("--workers=0", "--workers=1.5", "--part-megabytes=0", "--part-megabytes=nan"):
        with pytest.raises(SystemExit) as raised:
            main([*command, option])
        assert raised.value.code == 2


def test_workers_need_not_wait_for_torch() -> None:
    code = "import sys, uoe_parallel.preprocessing.program; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
