"""Writes what this machine has certified, after a whole run of the tests that passed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.device import chosen_device
from uoe_parallel.doctor.certificate import (
    FOLDER,
    Area,
    Certificate,
    certified_code,
    save_certificate,
)
from uoe_parallel.doctor.machine import devices
from uoe_parallel.doctor.versions import installed_versions

PASSED = ""


class Certifier:
    """A plugin of pytest.

    A run is whole if pytest chose the tests, none was left out but slow ones, and all that were
    collected ran to an end; and it counts if the code was the same all the time.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.code = certified_code()
        self.is_whole = True
        self.with_slow = True
        self.collected = 0
        self.outcomes: dict[str, str] = {}
        """PASSED or the reason why it was skipped, by test."""
        self.written: Path | None = None

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        slow = all(item.get_closest_marker("slow") for item in items)
        self.is_whole &= slow
        self.with_slow = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = len(session.items)
        self.is_whole &= session.config.args_source is pytest.Config.ArgsSource.TESTPATHS
        options = session.config.option
        self.is_whole &= not (options.ignore or options.ignore_glob)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            reason = getattr(report, "wasxfail", "") or report.longrepr
            text = reason[2] if isinstance(reason, tuple) else str(reason)
            self.outcomes[report.nodeid] = text.removeprefix("Skipped: ")
        elif report.when == "call" and report.passed:
            self.outcomes[report.nodeid] = PASSED

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        complete = self.is_whole and 0 < self.collected == len(self.outcomes)
        if exitstatus == 0 and complete and self.code == certified_code():
            self.written = save_certificate(self._certificate(), self.folder)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.written is not None:
            terminalreporter.write_line(f"certified for {chosen_device()}: {self.written}")

    def _certificate(self) -> Certificate:
        areas: defaultdict[str, list[str]] = defaultdict(list)
        for name, outcome in self.outcomes.items():
            areas["/".join(Path(name.partition("::")[0]).parts[:2])].append(outcome)
        return Certificate(
            device=chosen_device(),
            hardware="; ".join(f"{n} x {name}" for name, n in Counter(devices()).items()),
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            with_slow=self.with_slow,
            versions=installed_versions(),
            code=self.code,
            areas={area: _counted(outcomes) for area, outcomes in sorted(areas.items())},
        )


def _counted(outcomes: Sequence[str]) -> Area:
    reasons = Counter(outcome for outcome in outcomes if outcome != PASSED)
    return Area(passed=len(outcomes) - reasons.total(), skipped=dict(reasons))
