"""The loop that starts a failed run again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.launch.starting import has_written, started, wait_until
from tests.programs import CHECKOUT

RESTART = CHECKOUT / "launch" / "restart.sh"


def _end(*arguments: str, folder: Path) -> tuple[int, str]:
    """The exit code of the loop around a line of bash, and what it wrote to `folder`/log."""
    *options, line = arguments
    command = ("bash", RESTART, *options, "bash", "-c", line)
    with started(*command, output=folder / "output", variables={"F": str(folder)}) as process:
        code = process.wait(20)
    return code, (folder / "log").read_text()


@pytest.mark.parametrize(
    ("times", "codes", "ended"),
    [
        (3, [1, 137, 3, 0], 0),
        (2, [1, 1, 7], 7),
        (3, [2], 2),
        (3, [1, 2], 2),
        (0, [1], 1),
    ],
)
def test_starts_again_unless_it_is_done_or_the_user_has_to_act(
    times: int, codes: list[int], ended: int, tmp_path: Path
) -> None:
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    line = 'echo started >>$F/log; sed -i "1{w $F/next\nd}" $F/codes; exit $(<$F/next)'
    assert _end(str(times), line, folder=tmp_path) == (ended, "started\n" * len(codes))


def _ask(*arguments: str, folder: Path, asked: signal.Signals) -> tuple[int, str]:
    """As `_end`, with a signal to the loop as soon as the command has written a line."""
    *options, line = arguments
    command = ("bash", RESTART, *options, "bash", "-c", line)
    with started(*command, output=folder / "output", variables={"F": str(folder)}) as process:
        wait_until(has_written(folder / "log", "\n"), process, folder / "output")
        process.send_signal(asked)
        code = process.wait(20)
    return code, (folder / "log").read_text()


_LEAVES = """
leave() { echo $1 >>$F/log; exit 138; }
trap 'leave USR1' USR1
trap 'leave TERM' TERM
echo started >>$F/log
while true; do sleep 0.02; done
"""


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(("options", "passed"), [((), "TERM"), (("--ask", "USR1"), "USR1")])
def test_asked_to_leave_it_asks_the_command_and_says_by_what(
    options: tuple[str, ...], passed: str, asked: signal.Signals, tmp_path: Path
) -> None:
    ended = _ask(*options, "3", _LEAVES, folder=tmp_path, asked=asked)
    assert ended == (128 + asked, f"started\n{passed}\n")


def test_a_command_that_was_done_stays_done(tmp_path: Path) -> None:
    line = "trap 'exit 0' TERM; echo started >>$F/log; while true; do sleep 0.02; done"
    ended = _ask("3", line, folder=tmp_path, asked=signal.SIGTERM)
    assert ended == (0, "started\n")


def test_ranks_of_a_launcher_that_dies_at_the_signal_end_first(tmp_path: Path) -> None:
    rank = "trap 'sleep 0.3; echo saved >>$F/log; exit 138' USR1; echo started >>$F/log;"
    line = f'bash -c "{rank} while true; do sleep 0.02; done" & sleep 60'
    line = line.replace("$F", str(tmp_path))
    ended = _ask("--ask-all", "USR1", "3", line, folder=tmp_path, asked=signal.SIGTERM)
    assert ended == (143, "started\nsaved\n")


def test_ranks_of_a_launcher_that_crashed_are_gone_before_the_next(tmp_path: Path) -> None:
    line = """
    if [[ -e $F/rank ]]; then kill -0 $(<$F/rank) 2>/dev/null && echo alive >>$F/log; exit 0; fi
    sleep 60 &
    echo $! >$F/rank
    echo crashed >>$F/log
    kill -9 $$
    """
    assert _end("1", line, folder=tmp_path) == (0, "crashed\n")
