from __future__ import annotations

import io
import re

import pytest

from uoe_parallel.training.console import TrainingConsole

VALUES = {
    "loss": 2.0794,
    "bits_per_byte": 3.0,
    "gradient_norm": 0.512,
    "learning_rate": 3e-3,
    "tokens_per_second": 12345.6,
    "load_max_over_mean": 1.75,
    "memory_bytes": 123456789.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class CountingStream(io.StringIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


@pytest.fixture(autouse=True)
def terminal_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream, clock = CountingStream(), Clock()
    console = TrainingConsole(stream=stream, clock=clock)
    with console.progress(steps=1000):
        clock.now = 20.0
        console.report(10, VALUES)
        assert stream.flushes >= 1, "a line is seen when it is printed"
        clock.now = 40.0
        console.report(20, {**VALUES, "loss": 12.5, "tokens_per_second": 999.0})
    assert stream.getvalue().splitlines() == [
        "step   10/1000  loss   2.0794  bits/byte   3.0000  grad norm     0.512  lr 3.00e-03"
        "  tokens/s      12,346  max load   1.75  ETA  0:33:00",
        "step   20/1000  loss  12.5000  bits/byte   3.0000  grad norm     0.512  lr 3.00e-03"
        "  tokens/s         999  max load   1.75  ETA  0:32:40",
    ]


def test_missing_values_are_left_out_and_nan_is_shown() -> None:
    stream = io.StringIO()
    console = TrainingConsole(stream=stream)
    with console.progress(steps=10):
        console.report(1, {"loss": float("nan")})
    assert re.fullmatch(r"step  1/10  loss      nan  ETA +0:00:00\n", stream.getvalue())


def test_eta_follows_the_recent_speed_of_this_run() -> None:
    stream, clock = io.StringIO(), Clock()
    console = TrainingConsole(stream=stream, clock=clock)
    with console.progress(steps=1000, start=100):
        clock.now = 500.0  # a slow start
        console.report(110, {})
        for step in range(120, 500, 10):
            clock.now += 10.0
            console.report(step, {})
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("12:21:40"), "890 steps at 50 s: resumed steps took no time"
    assert lines[-1].endswith("0:08:30"), "510 steps at 1 s: the slow start is forgotten"


def test_terminal_shows_a_bar_and_messages_above_it() -> None:
    stream, clock = io.StringIO(), Clock()
    console = TrainingConsole(stream=stream, terminal=True, clock=clock)
    with console.progress(steps=1000):
        clock.now = 20.0
        console.report(10, VALUES)
        console.say("validation at step 10: [bold]loss 2.0")
    output = stream.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "\x1b[" in output and "━" in output
    assert "10/1000" in text and "loss 2.0794  tokens/s 12,346  ETA 0:33:00" in text
    assert "grad norm" not in text
    message = text.index("validation at step 10: [bold]loss 2.0\n")
    assert "10/1000" in text[message:], "the bar is drawn again below the message"
    assert output.rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_terminal_is_restored_when_training_fails() -> None:
    stream = io.StringIO()
    console = TrainingConsole(stream=stream, terminal=True)
    with pytest.raises(RuntimeError), console.progress(steps=10):
        raise RuntimeError
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = io.StringIO()
    console = TrainingConsole(stream=stream, terminal=True)
    with console.progress(steps=10):
        console.report(5, VALUES)
    console.table("Run", [("ranks", "2")])
    assert stream.getvalue().startswith("step  5/10  loss   2.0794  bits/byte")
    assert "\x1b" not in stream.getvalue()


def test_say_and_table_print_text_as_it_is() -> None:
    stream = io.StringIO()
    console = TrainingConsole(stream=stream)
    path = "/runs/" + "a-long-name/" * 12
    console.say(f"[red]not markup[/red] {path} :smile:")
    console.table("Run", [("run folder", path), ("loss [nats]", "2.08")])
    said, title, *rows = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert said == f"[red]not markup[/red] {path} :smile:"
    assert title.strip() == "Run"
    assert [row.split(maxsplit=2) for row in rows] == [
        ["run", "folder", path],
        ["loss", "[nats]", "2.08"],
    ]
    assert rows[0].index("/runs") == rows[1].index("2.08"), "columns are aligned"


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_prints_nothing(terminal: bool) -> None:
    stream = io.StringIO()
    console = TrainingConsole(stream=stream, terminal=terminal, quiet=True)
    console.say("x")
    console.table("x", [("x", "y")])
    with console.progress(steps=10):
        console.report(1, VALUES)
    assert stream.getvalue() == ""
