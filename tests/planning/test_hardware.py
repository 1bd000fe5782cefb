"""Profiles of machines: those that come with the package, a user's own, and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planning.cases import MACHINE, machine
from uoe_parallel.config import yaml_text
from uoe_parallel.errors import UserError
from uoe_parallel.planning.hardware import known_machines, load_hardware


def test_shipped_machines() -> None:
    assert known_machines() == ["a100", "b200", "h100", "h200"]
    a100, b200, h100, h200 = map(load_hardware, known_machines())
    for hardware in (a100, b200, h100, h200):
        assert hardware.devices_per_node == 8 and hardware.device == "cuda"
        assert {"bf16", "fp32", "fp64"} == set(hardware.flops)
        assert hardware.intra_node.bandwidth > hardware.inter_node.bandwidth
        assert hardware.intra_node.latency < hardware.inter_node.latency
    assert a100.flops["bf16"] < h100.flops["bf16"] == h200.flops["bf16"] < b200.flops["bf16"]
    assert a100.memory == h100.memory < h200.memory < b200.memory


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml_text.dump(MACHINE))
    assert load_hardware(str(path)) == machine()


def test_memory_that_is_needed() -> None:
    hardware = machine(reserved_memory=1000, fragmentation=0.1)
    assert hardware.needed(5000) == 1000 + 5500


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"memory": -1}, "memory: input should be greater than 0"),
        ({"flops": {"fp8": 1.0}}, "flops.fp8"),
        ({"sockets": 2}, "sockets: extra inputs are not permitted"),
        ({"intra_node": {"bandwidth": 1.0}}, "intra_node.latency: field required"),
    ],
)
def test_faults_are_told(tmp_path: Path, change: dict[str, object], told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml_text.dump(MACHINE | change))
    with pytest.raises(UserError, match=told) as raised:
        load_hardware(str(path))
    assert str(path) in str(raised.value)


def test_missing_profiles_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--gpu v100: .* a100, b200, h100, h200, or the path"):
        load_hardware("v100")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"this_machine.*--calibrate"):
        load_hardware("this_machine")
    with pytest.raises(UserError, match=r"bf16.*fp32 alone"):
        machine().peak("bf16")
