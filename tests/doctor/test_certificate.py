"""A whole run of the tests that passes is certified, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tests.certificate
from tests.certificate import Certifier
from tests.device import chosen_device
from uoe_parallel.doctor.certificate import (
    Area,
    Certificate,
    certified_code,
    read_certificates,
    save_certificate,
)

SUITE = """
import pytest

def test_passes():
    pass

@pytest.mark.skipif(True, reason="4 ranks need 4 GPUs, and this machine has 1")
def test_is_skipped():
    pass

@pytest.mark.slow
def test_is_slow():
    pass
"""
OPTIONS = """
[tool.pytest.ini_options]
testpaths = ["tests"]
markers = ["slow: takes long"]
"""
CERTIFICATE = Certificate(
    device="cpu",
    hardware="1 x A processor",
    when="2026-01-02T03:04:05+00:00",
    with_slow=False,
    versions={"torch": "2.13.0", "DeepSpeed": "0.19.8"},
    code="a" * 64,
    areas={"tests/model": Area(passed=3, skipped={"too few GPUs": 2}), "tests/a.py": Area(1, {})},
)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with tests, and the working folder."""
    (tmp_path / "pyproject.toml").write_text(OPTIONS)
    (tmp_path / "tests" / "inner").mkdir(parents=True)
    (tmp_path / "tests" / "inner" / "test_some.py").write_text(SUITE)
    (tmp_path / "tests" / "test_top.py").write_text("def test_top():\n    pass\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(suite: Path, *arguments: str) -> list[Certificate]:
    """What has been certified after pytest ran there."""
    folder = suite / "certified"
    quiet = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    pytest.main([*quiet, *arguments], plugins=[Certifier(folder)])
    return list(read_certificates(folder))


def test_a_whole_run_is_certified_with_what_was_skipped(suite: Path) -> None:
    [found] = _run(suite, "-m", "not slow")
    assert (found.device, found.with_slow, found.code) == (
        chosen_device(),
        False,
        certified_code(),
    )
    reason = "4 ranks need 4 GPUs, and this machine has 1"
    assert found.areas == {"tests/inner": Area(1, {reason: 1}), "tests/test_top.py": Area(1, {})}
    assert (found.passed, found.skipped) == (2, 1)
    [found] = _run(suite)
    assert (found.with_slow, found.passed) == (True, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-k", "top"),
        ("tests/inner",),
        ("--ignore", "tests/inner"),
        ("--deselect", "tests/test_top.py::test_top"),
        ("--collect-only",),
    ],
    ids=" ".join,
)
def test_a_part_of_the_tests_is_not_certified(suite: Path, arguments: tuple[str, ...]) -> None:
    assert _run(suite, *arguments) == []


def test_a_run_that_fails_is_not_certified(suite: Path) -> None:
    (suite / "tests" / "test_a.py").write_text("def test_fails():\n    assert False\n")
    assert _run(suite) == []


def test_code_that_changed_meanwhile_is_not_certified(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = iter(("before", "after"))
    monkeypatch.setattr(tests.certificate, "certified_code", lambda: next(codes))
    assert _run(suite) == []


def test_certificates_are_read_as_they_were_written(tmp_path: Path) -> None:
    gpu = replace(CERTIFICATE, device="cuda", with_slow=True)
    for certificate in (gpu, CERTIFICATE):
        save_certificate(replace(certificate, when="earlier"), tmp_path)
        save_certificate(certificate, tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    assert list(read_certificates(tmp_path)) == [CERTIFICATE, gpu]
    assert (gpu.passed, gpu.skipped) == (4, 2)


def test_a_certificate_holds_until_something_changes() -> None:
    versions, code = dict(CERTIFICATE.versions), CERTIFICATE.code
    assert CERTIFICATE.outdated_by(versions, code) == []
    assert CERTIFICATE.outdated_by(versions, "b") == ["the code"]
    changed = versions | {"torch": "2.14.0", "Apex": "0.1"}
    assert CERTIFICATE.outdated_by(changed, code) == ["Apex - -> 0.1", "torch 2.13.0 -> 2.14.0"]


def test_tests_and_pins_are_part_of_what_is_certified(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    codes = [certified_code(tmp_path)]
    for name in ("tests/test_a.py", "requirements-test.txt", "pyproject.toml"):
        (tmp_path / name).write_text("a = 1\n")
        codes.append(certified_code(tmp_path))
    (tmp_path / "notes.txt").touch()
    assert len(set(codes)) == 4 and certified_code(tmp_path) == codes[-1]
